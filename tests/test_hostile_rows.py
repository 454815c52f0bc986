"""Rows and files that a data folder may hold by mistake or by malice: each is named in one sentence, none hangs."""

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from common.data.check import check_records
from common.data.images import check_image
from common.data.manifest import LARGEST_FILE, load_manifest
from common.start.config import yaml_to_flags

PICTURE = "good.png"


@pytest.fixture
def folder(tmp_path) -> Path:
    Image.new("RGB", (32, 32), "red").save(tmp_path / PICTURE)
    return tmp_path


def problem(folder: Path, line: bytes) -> str:
    """What the check says of one line beside a good one; "" when it is taken."""
    good = json.dumps({"file_path": PICTURE, "text": "a red square"}).encode()
    (folder / "train.jsonl").write_bytes(good + b"\n" + line + b"\n" + good)
    records = load_manifest(folder)
    try:
        assert len(check_records(records, folder, progress=False)) == 3
    except ValueError as error:
        assert "1 of 3 rows are bad" in str(error), error
        assert "train.jsonl line 2" in str(error) and len(str(error)) < 800
        return str(error)
    return ""


def row(**values: object) -> bytes:
    return json.dumps({"file_path": PICTURE, "text": "a red square", **values}).encode()


ROWS = {
    "one byte that is no UTF-8": (b'{"file_path": "good.png", "text": "caf\xe9"}', "not UTF-8: byte 0xe9 at place 38"),
    "nesting without end": (b'{"text": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "nested too deeply"),
    "half a surrogate pair": (b'{"file_path": "good.png", "text": "\\ud800"}', "half of a surrogate pair"),
    "a number of 5000 digits": (b'{"file_path": "good.png", "text": ' + b"9" * 5000 + b"}", "not valid JSON"),
    "a caption of eight megabytes in the wrong place": (row(file_path=["x" * 8_000_000]), "expected a path"),
    "a list": (b"[1, 2]", "got a list, expected an object"),
    "half a line": (b'{"file_path": "good.p', "not valid JSON"),
    "no caption": (row(text=None), "text is None, expected a caption"),
    "an empty caption": (row(text=" \u00a0 "), "empty caption"),
    "a caption that is a number": (row(text=3), "text is 3, expected a caption"),
    "a path that is a number": (row(file_path=7), "file_path is 7, expected a path"),
    "a way out": (row(file_path="../../etc/passwd"), "outside train_data_dir"),
    "an absolute way out": (row(file_path="/etc/passwd"), "outside train_data_dir"),
    "a missing file": (row(file_path="nothing.png"), "missing"),
    "a folder": (row(file_path="."), "a directory"),
    "a NUL in the path": (row(file_path="a\0b.png"), "null"),
    "a path without end": (row(file_path="x" * 5000), "name too long"),
    "sources of the wrong kind": (row(source_file_path=[3]), "source_file_path is [3], expected paths"),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_bad_row_is_named(name, folder):
    """Catches tracebacks and messages of megabytes: every bad row is one short sentence with its line."""
    line, said = ROWS[name]
    assert said.lower() in problem(folder, line).lower()


@pytest.mark.parametrize("text", ["a\u2028b", "a\u2029b", "a\u0085b", "a\u000bb", "\U0001f600", "e\u0301"])
def test_unusual_characters_are_characters(text, folder):
    """Catches a reader that cuts a row at every Unicode line break."""
    assert problem(folder, json.dumps({"file_path": PICTURE, "text": text}, ensure_ascii=False).encode()) == ""


def test_pipes_and_devices_do_not_hang(folder):
    """Catches a check that waits for ever at a pipe's end."""
    os.mkfifo(folder / "pipe.png")
    assert "not an ordinary file" in problem(folder, row(file_path="pipe.png"))
    os.symlink("/dev/zero", folder / "zero.png")
    assert "outside train_data_dir" in problem(folder, row(file_path="zero.png"))


def test_a_sparse_file_is_refused_unread(folder):
    """Catches two gigabytes of nothing that are read into memory."""
    with open(folder / "sparse.png", "wb") as file:
        file.truncate(LARGEST_FILE + 1)
    assert "MiB; files of at most" in problem(folder, row(file_path="sparse.png"))


def test_only_formats_of_pictures_are_opened():
    """Catches an EPS, for which Pillow would run Ghostscript."""
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    with pytest.raises(ValueError, match="not an image"):
        check_image(eps, decode=True, max_pixels=10**6)


def test_a_yaml_that_is_none_is_one_sentence(tmp_path):
    """Catches a traceback of the YAML library where a line of the user's file is wrong."""
    (tmp_path / "bad.yaml").write_text("learning_rate: [1, 2\nresolution: 64\n")
    with pytest.raises(ValueError, match=r"bad.yaml is not valid YAML: .*line"):
        yaml_to_flags(tmp_path / "bad.yaml")
