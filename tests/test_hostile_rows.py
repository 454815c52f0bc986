"""Rows and files that a data folder may hold by mistake or by malice: each is named in one sentence, none hangs.

They are in hostile_rows.jsonl, with what must be said of each; conversations and boxes are tried in the tests of their
recipes.
"""

import json
import threading
from pathlib import Path

import pytest
from data_files import hostile_bytes, hostile_rows, png, write_hostile_files, write_tar
from properties import given, st

from common.data import check
from common.data.check import check_records
from common.data.images import check_image
from common.data.json_rows import parse_json
from common.data.manifest import _record, load_manifest
from common.data.row_files import RawRow
from common.start.config import yaml_to_flags

GOOD = b'{"file_path": "good.png", "text": "a red square"}'
KINDS = ("manifest", "file", "conversation", "boxes", "answer")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    write_hostile_files(folder)
    return folder


def test_the_corpus_is_large_and_has_verdicts():
    """Catches entries that are lost, stand twice or are good ones only."""
    entries = [(kind, row.values[0]) for kind in KINDS for row in hostile_rows(kind)]
    assert sum(bool(entry["said"]) for _, entry in entries) >= 200
    assert len({(kind, entry["name"]) for kind, entry in entries}) == len(entries)
    assert all(bool(entry["said"]) != entry["name"].startswith("good: ") for _, entry in entries)


@pytest.mark.parametrize("entry", hostile_rows("manifest"))
def test_a_bad_row_is_named(entry, folder):
    """Catches tracebacks, messages of megabytes and what is taken for good: every bad row is one short sentence with
    its line, and the good ones beside it are left alone."""
    (folder / "train.jsonl").write_bytes(b"\n".join([GOOD, hostile_bytes(entry), GOOD]))
    records = load_manifest(folder)
    if not entry["said"]:
        assert len(check_records(records, folder, progress=False)) == 3
        return
    with pytest.raises(ValueError, match="1 of 3 rows are bad") as error:
        check_records(records, folder, progress=False)
    said = str(error.value)
    assert "train.jsonl line 2" in said and entry["said"].lower() in said.lower() and len(said) < 800, said[:2000]
    assert len(check_records(records, folder, "skip", progress=False)) == 2


@pytest.mark.parametrize("entry", hostile_rows("file"))
def test_a_bad_file_is_named(entry, tmp_path):
    """Catches the same of whole manifests and of what a shard's members hold."""
    write_hostile_files(tmp_path)
    content, build = hostile_bytes(entry), entry.get("build", "")
    if build in ("txt", "json"):
        write_tar(tmp_path / "train.tar", {"0.png": png(), f"0.{build}": content})
    elif build:
        write_tar(tmp_path / "train.tar", {"0.png": png(size=(300, 300)), "0.txt": b"x"})
        content = (tmp_path / "train.tar").read_bytes()[:700]
        (tmp_path / "train.tar").write_bytes(content)
    else:
        (tmp_path / entry["file"]).write_bytes(content)
    if not entry["said"]:
        assert check_records(load_manifest(tmp_path, entry["file"]), tmp_path, progress=False)
        return
    with pytest.raises(ValueError) as error:
        check_records(load_manifest(tmp_path, entry["file"]), tmp_path, progress=False)
    said = str(error.value)
    assert entry["said"] in said and entry["file"] in said and len(said) < 800, said[:2000]


def test_a_row_that_takes_for_ever_is_named(tmp_path, monkeypatch):
    """Catches a disk that does not answer, for which the check would wait without a word."""
    (tmp_path / "good.png").write_bytes(png())
    (tmp_path / "train.jsonl").write_bytes(GOOD)
    monkeypatch.setattr(check, "ROW_SECONDS", 0.2)
    answers = threading.Event()
    checks = {"image": lambda *_: answers.wait(30) and (48, 32)}
    with pytest.raises(ValueError, match=r"^train.jsonl line 1: good.png: not looked at within 0.2 s"):
        check_records(load_manifest(tmp_path), tmp_path, progress=False, checks=checks)
    answers.set()


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


# ---- whatever else there may be: the parsers give a value or a short ValueError, nothing else

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
NAMES = st.sampled_from(["file_path", "text", "type", "source_file_path", "caption", "image"])


@given(st.binary(max_size=60) | VALUES.map(lambda value: json.dumps(value).encode()).flatmap(lambda data: st.builds(
    lambda at, byte: data[:at] + byte + data[at:], st.integers(0, len(data)), st.binary(max_size=2))))  # fmt: skip
def test_json_is_a_value_or_a_sentence(data):
    """Catches an exception of another kind from any bytes, and a value that cannot be written again."""
    try:
        value = parse_json(data)
    except ValueError as error:
        assert 0 < len(str(error)) <= 220
        return
    json.dumps(value, ensure_ascii=False).encode("utf-8")


@given(VALUES | st.dictionaries(NAMES, VALUES, max_size=6))
def test_a_row_of_anything_is_a_record_or_has_a_problem(row):
    """Catches an exception in place of a problem, and a good record whose columns are of another kind."""
    record = _record(RawRow(row, 1, "line 1"))
    if not record.problem:
        assert record.file_path and record.text.strip() and all(record.source_file_path)
    assert len(record.problem) <= 300
