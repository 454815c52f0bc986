"""Pictures, manifests and shards that the tests of common/data write."""

import io
import json
import os
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from common.data.row_files import LARGEST_FILE

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


def hostile_rows(kind: str) -> list:
    """What hostile_rows.jsonl holds of a kind, as pytest's parameters: dicts with name, row, and `said`, the words of
    the reason, "" for a row that is good after all."""
    entries = [json.loads(line) for line in Path(__file__).with_name("hostile_rows.jsonl").read_text().splitlines()]
    return [pytest.param(entry, id=entry["name"]) for entry in entries if entry["of"] == kind]


def hostile_bytes(entry: dict) -> bytes:
    """The row's bytes; times: [text, number] stands in the place of its @."""
    text, number = entry.get("times", ("@", 1))
    return entry["row"].replace("@", text * number).encode("latin-1" if entry.get("latin1") else "utf-8")


def write_hostile_files(folder: Path) -> None:
    """The files that the rows of hostile_rows.jsonl name."""
    good, noise = png(size=(32, 32)), Image.effect_noise((64, 64), 90)
    buffer = io.BytesIO()
    noise.save(buffer, "JPEG")
    files = {
        "good.png": good,
        "dot.png": png(size=(1, 1)),
        "clear.png": png((0, 0, 0, 0), mode="RGBA"),
        "narrow.png": png(size=(1000, 1)),
        "moving.gif": png(kind="GIF", save_all=True, append_images=[Image.new("RGB", (48, 32), "blue")]),
        "float.tiff": png(0.5, mode="F", kind="TIFF"),
        "bomb.png": png(1, size=(10_000, 10_000), mode="1"),
        "empty.png": b"",
        "head.png": good[:20],
        "half.png": buffer.getvalue()[:1000],
        "text.png": b"no picture",
        "page.png": b"<html>404</html>",
        "drawing.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n",
        "drawing.svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    os.mkfifo(folder / "pipe.png")
    (folder / "zero.png").symlink_to("/dev/zero")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    with open(folder / "sparse.png", "wb") as file:
        file.truncate(LARGEST_FILE + 1)
