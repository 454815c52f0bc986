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
    (folder / "list.xlsx").write_text("a,b")
    with pytest.raises(ValueError, match=r"expected a \.json, \.jsonl, \.csv"):
        manifest.load_manifest(folder, "list.xlsx")


def problems(folder, meta=None) -> list[str]:
    return [f"{record.where}: {record.problem}" for record in manifest.load_manifest(folder, meta) if record.problem]


@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_csv(folder, kind):
    """Catches a byte order mark in the first name, quoted commas and line breaks, and rows of too few or many fields
    that are read as something else; columns found by themselves, or given."""
    tab = "," if kind == "csv" else "\t"
    lines = [tab.join(("caption", "image", "note")), *(f"picture {n}{tab}train/{n}.png{tab}" for n in range(3))]
    (folder / f"train.{kind}").write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8")
    assert expect_three(folder)[2].where == f"train.{kind} line 4" and not expect_three(folder)[2].extra
    quoted = f'"a, b\tand ""c""\nd"{tab}train/0.png{tab}x'
    (folder / f"train.{kind}").write_text("\n".join((lines[0], quoted, f"a{tab}b{tab}c{tab}d", "a", lines[1])))
    first = manifest.load_manifest(folder)[0]
    assert (first.text, first.extra) == ('a, b\tand "c"\nd', {"note": "x"})
    assert [text.split(";")[0] for text in problems(folder)] == [
        f"train.{kind} line 4: 4 fields, expected 3",
        f"train.{kind} line 5: 1 fields, expected 3",
    ]
    manifest.load_manifest(folder, image_column="note", text_column="caption")
    (folder / f"train.{kind}").write_text("a,b\n1,2")
    with pytest.raises(ValueError, match=r"no column \['file_path', 'text'\], it has .*--text_column"):
        manifest.load_manifest(folder)
    (folder / f"train.{kind}").write_bytes(b"image,text\ncaf\xe9,x".replace(b",", tab.encode()))
    with pytest.raises(ValueError, match=r"cannot read the manifest.*line 1"):
        manifest.load_manifest(folder)


def test_pictures_with_texts(folder):
    """Catches a folder of pictures with a .txt each that needs a manifest first, hidden files taken for pictures, and
    a caption that is missing, empty or no UTF-8 without the picture's name."""
    for row in ROWS:
        (folder / row["file_path"]).with_suffix(".txt").write_text(f"\ufeff{row['text']}\n", encoding="utf-8")
    (folder / ".trash").mkdir()
    (folder / ".trash/9.png").write_bytes(png())
    (folder / "readme.txt").write_text("no caption")
    assert [record.file_path for record in expect_three(folder)] == [row["file_path"] for row in ROWS]
    (folder / "train/0.txt").unlink()
    (folder / "train/1.txt").write_text(" ")
    (folder / "train/2.txt").write_bytes(b"\xe9")
    assert problems(folder) == [
        "picture 0: train/0.png has no train/0.txt with its caption",
        "picture 1: empty caption",
        "picture 2: train/2.txt cannot be read: not UTF-8: byte 0xe9 at place 0",
    ]


def test_two_folders_of_edits(folder):
    """Catches sources that are exchanged, a .txt beside a source that is not found, and a picture without its other
    side."""
    for side, colour in (("target", "red"), ("source", "lime"), ("source2", "blue")):
        (folder / side).mkdir()
        for name in ("a.png", "b.png"):
            (folder / side / name).write_bytes(png(colour))
    shutil.rmtree(folder / "train")
    (folder / "target/a.txt").write_text("make it red")
    (folder / "source/b.txt").write_text("redden it")
    first, second = check.check_records(manifest.load_manifest(folder), folder, progress=False)
    assert (first.file_path, first.source_file_path) == ("target/a.png", ("source/a.png", "source2/a.png"))
    assert (first.text, second.text) == ("make it red", "redden it")
    assert manifest.load_image(first, folder, 1).getpixel((0, 0)) == (0, 0, 255)
    (folder / "source2/b.png").unlink()
    (folder / "target/a.png").unlink()
    assert problems(folder) == [
        "picture 0: target/b.png has no source2/b.png (or .jpg, .webp)",
        "source 0: source/a.png has no picture of its name in target/",
        "source 2: source2/a.png has no picture of its name in target/",
    ]


def test_saved_and_hub_data_sets(folder, parquet_cache, monkeypatch):
    """Catches data sets of the datasets library that must be exported first: a folder of save_to_disk, with splits or
    without, read without a network, and a name of the hub."""
    columns = {"image": [str(folder / row["file_path"]) for row in ROWS], "caption": [row["text"] for row in ROWS]}
    table = parquet_cache.Dataset.from_dict(columns).cast_column("image", parquet_cache.Image())
    table.save_to_disk(folder / "saved")
    records = check.check_records(manifest.load_manifest(folder / "saved"), folder / "saved", progress=False)
    assert [record.text for record in records] == [row["text"] for row in ROWS] and records[1].width == 48
    parquet_cache.DatasetDict(train=table, test=table.select([2])).save_to_disk(folder / "splits")
    assert len(manifest.load_manifest(folder / "splits")) == 3
    (record,) = manifest.load_manifest(folder / "splits", "test")
    assert manifest.load_image(record, folder / "splits").getpixel((0, 0)) == (0, 0, 255)
    with pytest.raises(ValueError, match=r"has the splits test, train, got dev.*--train_data_meta"):
        manifest.load_manifest(folder / "splits", "dev")

    def load_dataset(name, split):
        if (name, split) == ("someone/pictures", "train"):
            return table
        raise ConnectionError("no network")

    monkeypatch.setattr(parquet_cache, "load_dataset", load_dataset)
    first, *_ = check.check_records(manifest.load_manifest("someone/pictures"), "someone/pictures", progress=False)
    assert (first.file_path, first.where) == ("someone/pictures::0", "someone/pictures row 0")
    with pytest.raises(ValueError, match=r"is no folder, and no data set of the hub.*split dev.*no network"):
        manifest.load_manifest("someone/pictures", "dev")


def test_what_was_found_and_what_is_read(folder):
    """Catches a refusal that leaves a person to guess: what lies there, what would be read."""
    (folder / "list.xlsx").write_text("")
    (folder / "1.gif").write_text("")
    with pytest.raises(ValueError, match="no manifest") as refused:
        manifest.load_manifest(folder)
    for word in (
        "1 .xlsx files",
        "1 .gif files",
        "the folder train",
        "metadata.jsonl",
        "train.csv",
        ".txt of the same",
    ):
        assert word in str(refused.value)


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
    """Catches a mask that is missing, broken, no path or of another size and is found out about in the middle of
    training."""
    masks = ["train/1.png", "train/9.png", "page.png", None, "../outside.png", "small.png"]
    (folder / "page.png").write_bytes(b"<html>404</html>")
    (folder / "small.png").write_bytes(png(size=(24, 16)))
    rows = [ROWS[0] | ({"mask_path": mask} if mask else {}) for mask in masks]
    write_lines(folder / "train.jsonl", rows)
    good = check.check_records(
        manifest.load_manifest(folder), folder, "skip", folder, progress=False, file_columns=("mask_path",)
    )
    assert [record.extra["mask_path"] for record in good] == ["train/1.png"]
    assert manifest.load_image(good[0], folder, "mask_path").getpixel((0, 0)) == (0, 128, 0)
    reasons = [json.loads(line)["reason"] for line in (folder / "bad_rows.jsonl").read_text().splitlines()]
    expected = ["missing", "not an image", "is None, expected a path", "outside train_data_dir"]
    expected += ["is 24 x 16, expected the picture's 48 x 32"]
    assert reasons == [f"mask_path: {words}" for words in expected]


def test_masks_in_parquet(folder, parquet_cache):
    """Catches a mask that is found as a path only, or is another row's."""
    colours = ["white", "black", "white"]
    columns = {"image": [png(), png("blue"), png("lime")], "mask": [png(colour, mode="L") for colour in colours]}
    table = parquet_cache.Dataset.from_dict({"text": ["a", "b", "c"], **columns})
    for name in columns:
        table = table.cast_column(name, parquet_cache.Image())
    table.to_parquet(folder / "train.parquet")
    records = check.check_records(manifest.load_manifest(folder), folder, progress=False, file_columns=("mask",))
    found = [manifest.load_image(record, folder, "mask").getpixel((0, 0))[0] for record in records]
    assert found == [255, 0, 255]
