"""Pictures, manifests and shards that the tests of common/data write."""

import io
import json
import tarfile
from pathlib import Path

from PIL import Image

ROWS = [{"file_path": f"train/{number}.png", "text": f"picture {number}", "width": 7} for number in range(3)]


def png(colour="red", size=(48, 32), mode="RGB", kind="PNG", **options) -> bytes:
    """The bytes of a picture of one colour."""
    buffer = io.BytesIO()
    Image.new(mode, size, colour).save(buffer, kind, **options)
    return buffer.getvalue()


def write_lines(path: Path, rows: list) -> None:
    """A JSONL file; a row that is a string is written as it is."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
