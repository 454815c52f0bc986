"""common/data/manifest.py and check.py: every kind of manifest, and what is said about every kind of bad row."""

import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from data_files import ROWS, png, write_lines, write_tar
from PIL import Image

from common.data import check, images, known_files, manifest

# ---- manifests


def expect_three(folder, meta=None, **columns):
    """The three pictures of `folder`, checked, in order and with their pixels."""
    records = check.check_records(manifest.load_manifest(folder, meta, **columns), folder, progress=False)
    assert [record.text for record in records] == ["picture 0", "picture 1", "picture 2"]
    assert [manifest.load_image(record, folder).getpixel((0, 0)) for record in records] == [
        (255, 0, 0),
        (0, 128, 0),
        (0, 0, 255),
    ]
    assert all((record.width, record.height) == (48, 32) for record in records)
    return records


def test_json_list(folder, monkeypatch):
    """Catches rows lost, numbered from 1 or stripped of other columns, and a manifest found in one place only."""
    (folder / "train.json").write_text(json.dumps(ROWS))
    records = expect_three(folder)
    assert [record.row for record in records] == [0, 1, 2] and records[0].extra == {"width": 7}
    expect_three(folder, "train.json")
    expect_three(folder, folder / "train.json")
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    (folder / "train.json").rename(elsewhere / "mine.json")
    monkeypatch.chdir(elsewhere)
    expect_three(folder, "mine.json")  # relative to the working directory


def test_jsonl_counts_lines(folder):
    """Catches messages that name another line than the one a person opens."""
    write_lines(folder / "train.jsonl", [ROWS[0], "", *ROWS[1:]])
    assert [record.row for record in expect_three(folder)] == [1, 3, 4]


def test_image_folder(folder):
    """Catches datasets' image folders (file_name, metadata.jsonl) that need renaming first."""
    write_lines(folder / "metadata.jsonl", [{"file_name": row["file_path"], "text": row["text"]} for row in ROWS])
    assert expect_three(folder)[2].where == "metadata.jsonl line 3"


@pytest.mark.parametrize("kind", ["image feature", "bytes", "paths"])
def test_parquet(folder, parquet_cache, kind):
    """Catches one of three ways in which parquet holds pictures, rows out of order, a missing column unnamed."""
    contents = [(folder / row["file_path"]).read_bytes() for row in ROWS]
    if kind == "image feature":
        contents = [{"bytes": image, "path": None} for image in contents]
    if kind == "paths":
        contents = [row["file_path"] for row in ROWS]
    features = {"image feature": parquet_cache.Image(), "bytes": parquet_cache.Value("binary")}
    columns = {"image": contents, "text": [row["text"] for row in ROWS], "score": [1, 2, 3]}
    table = parquet_cache.Dataset.from_dict(columns)
    table.cast_column("image", features.get(kind, parquet_cache.Value("string"))).to_parquet(folder / "part.parquet")
    records = expect_three(folder)
    assert records[1].extra == {"score": 2}
    assert records[1].file_path == ("train/1.png" if kind == "paths" else "part.parquet::1")
    assert [record.row for record in records] == [0, 1, 2]
    with pytest.raises(ValueError, match=r"no column \['caption'\].*--text_column"):
        manifest.load_manifest(folder, text_column="caption")


def test_parquet_sources_and_columns(folder, parquet_cache):
    """Catches source pictures of edits that are lost or exchanged, and given columns ignored."""
    columns = {
        "target": [png("red")],
        "source_target": [png("blue")],
        "source_target2": [png("lime")],
        "prompt": ["x"],
    }
    parquet_cache.Dataset.from_dict(columns).to_parquet(folder / "edit.parquet")
    records = manifest.load_manifest(folder, image_column="target", text_column="prompt")
    (record,) = check.check_records(records, folder, progress=False)
    assert len(record.source_file_path) == 2
    assert manifest.load_image(record, folder, 0).getpixel((0, 0)) == (0, 0, 255)
    assert manifest.load_image(record, folder, 1).getpixel((0, 0)) == (0, 255, 0)


def test_webdataset(folder):
    """Catches members of one sample torn apart, shards out of order, and what a tar has wrong unsaid."""
    contents = [(folder / row["file_path"]).read_bytes() for row in ROWS]
    second = {"001.png": contents[1], "001.json": b'{"text": "picture 1", "score": 3}', "001.source.png": png("lime")}
    write_tar(folder / "a-0.tar", {"000.png": contents[0], "000.txt": b"picture 0", **second})
    write_tar(folder / "a-1.tar", {"x/002.png": contents[2], "x/002.txt": b"picture 2\n"})
    records = expect_three(folder)
    assert [record.file_path for record in records] == ["a-0.tar::000", "a-0.tar::001", "a-1.tar::x/002"]
    assert records[1].extra == {"score": 3}
    assert manifest.load_image(records[1], folder, 0).getpixel((0, 0)) == (0, 255, 0)
    expect_three(folder, "a-*.tar")
    write_tar(
        folder / "bad.tar", {"000.txt": b"no image", "001.png": contents[0], "001.json": b"{", "002.png": contents[0]}
    )
    reasons = [record.problem for record in manifest.load_manifest(folder, "bad.tar")]
    assert "no image" in reasons[0] and "not valid JSON" in reasons[1] and "text is None" in reasons[2]


def test_manifest_errors(folder):
    """Catches an empty, missing or unreadable manifest that ends in a traceback."""
    with pytest.raises(ValueError, match="no manifest"):
        manifest.load_manifest(folder)
    with pytest.raises(ValueError, match="is no folder"):
        manifest.load_manifest(folder / "nowhere")
    for content, message in (("[]", "zero rows"), ("{}", "expected a list"), ("[", "cannot read the manifest")):
        (folder / "train.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            manifest.load_manifest(folder)
    (folder / "list.csv").write_text("a,b")
    with pytest.raises(ValueError, match=r"expected a \.json"):
        manifest.load_manifest(folder, "list.csv")


# ---- bad rows


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


NOISE = np.random.RandomState(0).randint(0, 255, (64, 64, 3), dtype=np.uint8)


def bad_rows(folder: Path) -> list[tuple[object, str]]:
    """(row, words of the reason) of every kind of bad row, with the files that they name."""
    buffer = io.BytesIO()
    Image.fromarray(NOISE).save(buffer, "JPEG")
    files = {
        "cut.jpg": half(buffer.getvalue()),
        "cut.png": half((folder / "train/0.png").read_bytes()),
        "cut.webp": half(png(kind="WEBP")),
        "head.png": png()[:20],
        "empty.png": b"",
        "page.png": b"<html>404</html>",
        "bomb.png": png(size=(3000, 1000)),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    outside = folder.parent / f"{folder.name}-outside.png"
    outside.write_bytes(png())
    (folder / "link.png").symlink_to(outside)
    good = {"file_path": "train/0.png", "text": "x"}
    return [
        ({"file_path": "train/9.png", "text": "x"}, "missing"),
        ({"file_path": "train", "text": "x"}, "directory"),
        ({"file_path": "cut.jpg", "text": "x"}, "truncated"),
        ({"file_path": "cut.png", "text": "x"}, "truncated"),
        ({"file_path": "cut.webp", "text": "x"}, "truncated"),
        ({"file_path": "head.png", "text": "x"}, "truncated"),
        ({"file_path": "empty.png", "text": "x"}, "truncated: only 0 bytes"),
        ({"file_path": "page.png", "text": "x"}, "not an image"),
        ({"file_path": "bomb.png", "text": "x"}, "a decompression bomb: 3000 x 1000"),
        ({"file_path": f"../{outside.name}", "text": "x"}, "outside train_data_dir"),
        ({"file_path": str(outside), "text": "x"}, "outside train_data_dir"),
        ({"file_path": "link.png", "text": "x"}, "outside train_data_dir"),
        (good | {"text": " \n"}, "empty caption"),
        (good | {"text": 7}, "text is 7, expected a caption"),
        (good | {"type": "video"}, "type is 'video'"),
        ({"file_path": "train/0.png"}, "text is None"),
        ({"text": "x"}, "file_path is None"),
        (good | {"source_file_path": ["train/1.png", "train/9.png"]}, "source 1 (train/9.png): missing"),
        (good | {"source_file_path": "page.png"}, "source 0 (page.png): not an image"),
        (good | {"source_file_path": [1]}, "expected paths"),
        (["x"], "got a list, expected an object"),
        ('"x"', "got a str, expected an object"),
        ("{broken", "not valid JSON"),
    ]


def test_bad_rows(folder, capsys):
    """Catches a bad row that is trained on, named without its reason or file, or not listed when it is left out."""
    bad = bad_rows(folder)
    write_lines(folder / "train.jsonl", [ROWS[0], *(row for row, _ in bad), ROWS[1]])
    records = manifest.load_manifest(folder)
    with pytest.raises(ValueError, match=f"{len(bad)} of {len(bad) + 2} rows are bad.*--on_bad_rows skip") as error:
        check.check_records(records, folder, progress=False, max_pixels=2_000_000)
    lines = str(error.value).splitlines()
    assert len(lines) == 21  # the sentence and the first 20
    assert lines[1] == "  train.jsonl line 2: train/9.png: missing"
    good = check.check_records(records, folder, "skip", folder / "out", progress=False, max_pixels=2_000_000)
    assert [record.file_path for record in good] == ["train/0.png", "train/1.png"]
    assert f"{len(bad)} of {len(bad) + 2} rows are bad" in capsys.readouterr().out
    written = [json.loads(line) for line in (folder / "out/bad_rows.jsonl").read_text().splitlines()]
    assert [row["row"] for row in written] == [*range(2, len(bad) + 2)]
    for row, (_, reason) in zip(written, bad, strict=True):
        assert reason in row["reason"], row
    with pytest.raises(ValueError, match="none is left"):
        check.check_records([record for record in records if record.row == 2], folder, "skip", progress=False)


def test_pillows_own_bomb_limit(folder, monkeypatch):
    """Catches a check that turns Pillow's own limit off."""
    (folder / "bomb.png").write_bytes(png(size=(1000, 1000)))
    write_lines(folder / "train.jsonl", [{"file_path": "bomb.png", "text": "x"}])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400_000)
    with pytest.raises(ValueError, match="decompression bomb"):
        check.check_records(manifest.load_manifest(folder), folder, progress=False)


def test_a_good_row_may_use_dots_and_inner_links(folder):
    """Catches a check of paths that refuses what stays inside the folder."""
    (folder / "train/link.png").symlink_to(folder / "train/0.png")
    rows = [{"file_path": path, "text": "x"} for path in ("train/../train/0.png", "train/link.png")]
    (folder / "train.json").write_text(json.dumps(rows))
    assert len(check.check_records(manifest.load_manifest(folder), folder, progress=False)) == 2


@pytest.fixture
def known(tmp_path, monkeypatch):
    """known(): what earlier starts knew. Files need not be two seconds old."""
    monkeypatch.setattr(known_files, "SETTLED", -(10**12))
    return lambda: known_files.KnownFiles(tmp_path / "known_files.npy")


def test_known_files_are_not_read_again(folder, known, monkeypatch):
    """Catches a start that reads or decodes what an earlier one has, and one that gets anything else for it: of
    targets, sources, further columns and shards."""
    rows = [
        {**ROWS[0], "source_file_path": ["train/1.png", "train/2.png"], "mask": "train/2.png"},
        ROWS[1] | {"mask": "train/0.png"},
    ]
    (folder / "train.json").write_text(json.dumps(rows))
    write_tar(folder / "a.tar", {"0.png": png(size=(64, 32)), "0.txt": b"x", "0.source.png": png("lime")})
    asked = [("train.json", ("mask",)), ("a.tar", ())]

    def look() -> list:
        found = []
        for meta, columns in asked:
            records = manifest.load_manifest(folder, meta)
            found += check.check_records(records, folder, known_good=known(), progress=False, file_columns=columns)
        return found

    first = look()
    with monkeypatch.context() as patched:
        patched.setattr(check, "read_bytes", lambda *_: pytest.fail("read"))
        assert look() == first and len({record.digest for record in first}) == 3
    records = manifest.load_manifest(folder, "a.tar")
    with pytest.raises(ValueError, match="a decompression bomb"):  # known, but too large for this run
        check.check_records(records, folder, known_good=known(), progress=False, max_pixels=2000)


def test_files_that_changed_are_read_again(folder, known, monkeypatch):
    """Catches a picture that was replaced by one of the same size and time, a source likewise, and a file that is
    trusted although it may still be written to; what is only elsewhere is read, not decoded."""
    (folder / "train.json").write_text(json.dumps([ROWS[0] | {"source_file_path": "train/1.png"}]))

    def digest() -> str:
        records = manifest.load_manifest(folder)
        return check.check_records(records, folder, known_good=known(), progress=False)[0].digest

    digests = [digest()]
    for path, colour in (("train/0.png", "lime"), ("train/1.png", "black")):
        before = (folder / path).stat()
        content = png(colour).ljust(before.st_size, b"x")[: before.st_size]
        (folder / path).write_bytes(content)
        os.utime(folder / path, ns=(before.st_atime_ns, before.st_mtime_ns))
        digests.append(digest())
    assert len(set(digests)) == 3
    shutil.copy(folder / "train/0.png", folder / "copy")
    (folder / "copy").replace(folder / "train/0.png")
    monkeypatch.setattr(images, "decode_image", lambda *_: pytest.fail("decoded"))
    assert digest() == digests[-1]
    monkeypatch.setattr(known_files, "SETTLED", 10**12)
    monkeypatch.setattr(check, "read_bytes", lambda *_: (_ for _ in ()).throw(OSError("read")))
    with pytest.raises(ValueError, match="read"):
        digest()


def test_a_damaged_list_of_known_files_is_begun_anew(folder, known, capsys, tmp_path):
    """Catches half a file that ends every start from then on."""
    (tmp_path / "known_files.npy").write_bytes(b"half")
    (folder / "train.json").write_text(json.dumps(ROWS))
    check.check_records(manifest.load_manifest(folder), folder, known_good=known(), progress=False)
    assert "cannot be read" in capsys.readouterr().out and len(known().entries) == 3


def test_further_columns_of_pictures(folder):
    """Catches a mask that is missing, broken or no path and is found out about in the middle of training."""
    masks = ["train/1.png", "train/9.png", "page.png", None, "../outside.png"]
    (folder / "page.png").write_bytes(b"<html>404</html>")
    rows = [ROWS[0] | ({"mask_path": mask} if mask else {}) for mask in masks]
    write_lines(folder / "train.jsonl", rows)
    good = check.check_records(
        manifest.load_manifest(folder), folder, "skip", folder, progress=False, file_columns=("mask_path",)
    )
    assert [record.extra["mask_path"] for record in good] == ["train/1.png"]
    assert manifest.load_image(good[0], folder, "mask_path").getpixel((0, 0)) == (0, 128, 0)
    reasons = [json.loads(line)["reason"] for line in (folder / "bad_rows.jsonl").read_text().splitlines()]
    expected = ["missing", "not an image", "is None, expected a path", "outside train_data_dir"]
    assert reasons == [f"mask_path: {words}" for words in expected]
