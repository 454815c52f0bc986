"""common/make_manifest.py: from pictures as they lie to a folder to train on, and the sheet of thumbnails."""

import json
import sys

import pytest
from data_files import png, write_lines
from PIL import Image

from common import make_manifest
from common.data import check, manifest

COLOURS = {"red": (255, 0, 0), "lime": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}


@pytest.fixture
def make(tmp_path, monkeypatch):
    """make(source, ...): the checked rows of OUT, and OUT."""

    def run(source: object, *flags: object) -> tuple:
        out = tmp_path / "out"
        monkeypatch.setattr(sys, "argv", list(map(str, ["make_manifest.py", source, out, *flags])))
        make_manifest.main()
        return check.check_records(manifest.load_manifest(out), out, progress=False), out

    return run


def test_figures_in_parquet(tmp_path, parquet_cache, make):
    """Catches pictures that are encoded anew or exchanged, columns and bad rows that are lost, small pictures that
    stay, a limit that is not kept, and a sheet that shows other pictures than it names."""
    figures = [png("red", (400, 300)), png("lime", (90, 300)), b"broken", png("blue", (400, 400), kind="JPEG")]
    figures += [png("white", (400, 400))] * 3
    captions = ["a red figure", "small", "broken", "a blue figure", "x", "y", "z"]
    table = parquet_cache.Dataset.from_dict(
        {"figure": figures, "caption": captions, "pages": [[1], [2], [3], [4]] * 1 + [[5]] * 3}
    )
    (tmp_path / "papers").mkdir()
    table.to_parquet(tmp_path / "papers/part-0.parquet")
    flags = ("--image_column", "figure", "--min_side", 200, "--limit", 3, "--thumbnails", 2)
    rows, out = make(tmp_path / "papers", *flags)
    assert [(row.text, row.extra["pages"]) for row in rows] == [
        ("a red figure", [1]),
        ("a blue figure", [4]),
        ("x", [5]),
    ]
    assert [row.file_path.rpartition(".")[2] for row in rows] == ["png", "jpeg", "png"]
    assert [(out / row.file_path).read_bytes() for row in rows] == [figures[0], figures[3], figures[4]]
    (bad,) = map(json.loads, (out / "bad_rows.jsonl").read_text().splitlines())
    assert bad["where"] == "part-0.parquet row 2" and bad["reason"] == "not an image"
    with Image.open(out / "thumbnails.png") as sheet:
        assert sheet.getpixel((20, 20)) == COLOURS["red"] and sheet.getpixel((284, 20))[2] > 200
        assert sheet.width == 2 * 264, "two of three rows"
    with pytest.raises(ValueError, match=r"has a train\.jsonl already"):
        make(tmp_path / "papers", *flags)


def test_edits_and_lists_of_captions(tmp_path, make):
    """Catches sources that are lost or on the wrong side of their target, and captions after the first."""
    for name, colour in (("a.png", "red"), ("b.png", "lime"), ("c.png", "blue")):
        (tmp_path / name).write_bytes(png(colour, (256, 256)))
    row = {"file_path": "a.png", "text": ["one", "two"], "source_file_path": ["b.png", "c.png"], "id": 7}
    write_lines(tmp_path / "mine.jsonl", [row])
    (made,), out = make(tmp_path / "mine.jsonl")
    assert made.captions == ("one", "two") and made.extra == {"id": 7} and len(made.source_file_path) == 2
    shown = [manifest.load_image(made, out, which).getpixel((0, 0)) for which in (None, 0, 1)]
    assert shown == [COLOURS["red"], COLOURS["lime"], COLOURS["blue"]]
    with Image.open(out / "thumbnails.png") as sheet:
        assert [sheet.getpixel((100 + 256 * place, 100)) for place in range(3)] == [*shown[1:], shown[0]]


def test_nothing_left_is_said(tmp_path, make):
    """Catches an empty manifest that ends in another command's traceback."""
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "a.txt").write_text("a picture")
    with pytest.raises(ValueError, match=r"no picture of .* sides of 500 pixels; lower --min_side"):
        make(tmp_path, "--min_side", 500)
