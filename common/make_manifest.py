"""A folder to train on, made of pictures as they lie: `python -m common.make_manifest SOURCE OUT`, or by its path.

SOURCE is whatever --train_data_dir reads (a folder with a manifest, with pictures and texts or with parquet files, a
data set that the datasets library saved, the name of one on the hub), a YAML list of such, or one manifest. OUT gets
train.jsonl, the pictures' own bytes, bad_rows.jsonl with what cannot be used and why, and thumbnails.png to look at.

python -m common.make_manifest /data/figures data/figures --image_column figure --text_column caption --min_side 512
"""

import argparse
import io
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from PIL import Image

from common.data.check import check_records
from common.data.manifest import Record, load_image, read_bytes
from common.data.sets import LISTS, load_rows
from common.record.folder import write_atomically
from common.record.pictures import draw_grid
from common.start.plan import explained_errors

THUMBNAIL = 256  # pixels


def make_manifest(
    source: Path, out: Path, meta: str | None, columns: tuple[str | None, str | None], min_side: int, limit: int
) -> list[Record]:
    """The rows of source that can be used, at most limit (0: all), written to out; columns: of pictures and of
    captions. ValueError where out has a manifest already, or nothing is left."""
    if (out / "train.jsonl").exists():
        raise ValueError(f"{out} has a train.jsonl already; give another OUT, or delete that file")
    good = check_records(load_rows(source, meta, *columns), source, "skip", out)
    large = [record for record in good if min(record.width, record.height) >= min_side]
    if not large:
        raise ValueError(f"no picture of {source} has sides of {min_side} pixels; lower --min_side")
    kept = large[: limit or None]
    (out / "pictures").mkdir(parents=True, exist_ok=True)
    rows = [
        json.dumps(_written(record, number, source, out), ensure_ascii=False, default=str)
        for number, record in enumerate(kept)
    ]
    write_atomically(out / "train.jsonl", "\n".join(rows) + "\n")
    print(f"{len(kept)} rows kept; {len(good) - len(large)} pictures have sides under {min_side} pixels")
    return kept


def _written(record: Record, number: int, folder: Path, out: Path) -> dict:
    """The row in train.jsonl, its pictures written."""
    paths = []
    for which in (None, *range(len(record.source_file_path))):
        data = read_bytes(record, folder, which)
        name = f"{number:06d}" if which is None else f"{number:06d}_source_{which}"
        paths.append(f"pictures/{name}.{Image.open(io.BytesIO(data)).format.lower()}")
        (out / paths[-1]).write_bytes(data)
    row = {"file_path": paths[0], "text": list(record.captions) if record.other_texts else record.text}
    return row | ({"source_file_path": paths[1:]} if paths[1:] else {}) | record.extra


def draw_thumbnails(records: Sequence[Record], folder: Path, out: Path, count: int) -> Path:
    """thumbnails.png: `count` rows, spread evenly, sources left of their target, captions under them."""
    shown = records[:: max(1, len(records) // count)][:count]
    with tempfile.TemporaryDirectory() as drawn:
        for number, record in enumerate(shown):
            for which in (*range(len(record.source_file_path)), None):
                image = load_image(record, folder, which, at_least=(THUMBNAIL, THUMBNAIL))
                image.thumbnail((THUMBNAIL, THUMBNAIL))
                image.save(Path(drawn, f"{number:03d}.png" if which is None else f"{number:03d}_source_{which}.png"))
        draw_grid(Path(drawn), [record.text for record in shown], columns=8, side=THUMBNAIL)
        (out / "thumbnails.png").write_bytes(Path(drawn, "grid.png").read_bytes())
    return out / "thumbnails.png"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a folder, a manifest, a YAML list, or a name on the hub")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--meta", help="manifest in SOURCE where it has another name, or the split of a data set")
    parser.add_argument("--image_column", help="column of the pictures, where it is not found by itself")
    parser.add_argument("--text_column", help="column of the captions, where it is not found by itself")
    parser.add_argument(
        "--min_side", type=int, default=1, help="leave smaller pictures out: pixels of the shorter side"
    )
    parser.add_argument("--limit", type=int, default=0, help="rows to keep, the first ones; 0 is all")
    parser.add_argument("--thumbnails", type=int, default=40, help="pictures on the sheet")
    args = parser.parse_args()
    one_file = args.source.is_file() and args.source.suffix not in LISTS
    source, meta = (args.source.parent, args.source.name) if one_file else (args.source, args.meta)
    kept = make_manifest(source, args.out, meta, (args.image_column, args.text_column), args.min_side, args.limit)
    print(f"look at {draw_thumbnails(kept, source, args.out, args.thumbnails)}")
    print(f"train on them: --train_data_dir {args.out}")


if __name__ == "__main__":
    with explained_errors():
        main()
