"""common/data/notices.py: what is legal in the data and probably wrong is counted, and good data says nothing."""

import io

import pytest
from data_files import png, write_lines, write_tar
from PIL import Image

from common.data import check, manifest


def animated(kind: str) -> bytes:
    file = io.BytesIO()
    frames = [Image.new("RGB", (48, 48), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(file, kind, save_all=True, append_images=frames[1:])
    return file.getvalue()


ODD = [
    ({"a.png": png(size=(1, 1))}, {}, "1 of 2 rows: a picture with a side under 32 pixels (train.jsonl line 2"),
    ({"a.png": png(size=(3000, 40))}, {}, "1 of 2 rows: a picture longer than 4 : 1: most is cut off"),
    ({"a.gif": animated("GIF")}, {}, "1 of 2 rows: animated or of several pages: the first picture is used"),
    ({"a.webp": animated("WEBP")}, {}, "1 of 2 rows: animated"),
    ({"a.png": animated("PNG")}, {}, "1 of 2 rows: animated"),
    ({"a.tiff": animated("TIFF")}, {}, "1 of 2 rows: animated"),
    ({"a.png": png("blue")}, {"source_file_path": ["a.png"]}, "1 of 2 rows: a source and the target are the same"),
    ({"a.png": png("red")}, {"text": "good"}, "1 of 2 rows: the same picture and caption as an earlier row (that of"),
]


@pytest.mark.parametrize(("files", "columns", "said"), ODD, ids=[said[:60] for *_, said in ODD])
def test_what_is_probably_wrong_is_counted(files, columns, said, tmp_path, capsys):
    """Catches data that trains to nothing and about which nobody is told."""
    for name, content in {"good.png": png("red"), **files}.items():
        (tmp_path / name).write_bytes(content)
    row = {"file_path": next(iter(files)), "text": "odd", **columns}
    write_lines(tmp_path / "train.jsonl", [{"file_path": "good.png", "text": "good"}, row])
    assert len(check.check_records(manifest.load_manifest(tmp_path), tmp_path, progress=False)) == 2
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("notice: ")]
    assert len(lines) == 1 and lines[0].startswith(f"notice: {said}"), lines


def test_good_data_says_nothing(tmp_path, capsys):
    """Catches notices that cry wolf: the same picture with another caption, and sources that differ."""
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        (tmp_path / name).write_bytes(png(colour))
    rows = [{"file_path": "a.png", "text": text, "source_file_path": ["b.png"]} for text in ("one", "two")]
    write_lines(tmp_path / "train.jsonl", rows)
    check.check_records(manifest.load_manifest(tmp_path), tmp_path, progress=False)
    assert "notice" not in capsys.readouterr().out


def test_two_images_of_one_key_are_counted(tmp_path, capsys):
    """Catches a shard of which half of the images are passed over, and nobody is told; a source is none of them."""
    members = {"a.png": png("red"), "a.jpg": png("blue", kind="JPEG"), "a.txt": b"one", "b.source.png": png("red")}
    write_tar(tmp_path / "train.tar", members | {"b.png": png("blue"), "b.txt": b"two"})
    records = manifest.load_manifest(tmp_path)
    said = "notice: 1 of 2 samples of train.tar: several images, of which the last one is used (a, for one)\n"
    assert capsys.readouterr().out == said and manifest.read_bytes(records[0], tmp_path) == members["a.jpg"]


def test_keys_that_stand_twice_are_counted(tmp_path, capsys):
    """Catches a caption that another one in its row has replaced, and nobody is told."""
    (tmp_path / "a.png").write_bytes(png("red"))
    write_lines(tmp_path / "train.jsonl", ['{"file_path": "a.png", "text": "one", "text": "two"}', '{"a": {"b": 1}}'])
    assert manifest.load_manifest(tmp_path)[0].text == "two"
    said = "notice: 1 rows of train.jsonl: a key stands twice, of which the last one counts ('text', for one)\n"
    assert capsys.readouterr().out == said
