"""common/progress.py: what a log file shows of progress, and where a run's time went."""

import json
import sys

import pytest

from common import progress
from common.progress import progress_bar, stage, stages


@pytest.fixture(autouse=True)
def fresh():
    stages.begin()
    yield
    stages.begin()


def test_a_log_file_gets_few_lines(capsys, monkeypatch):
    """Catches bars that fill a log file, and a stage of minutes that says nothing."""
    now = iter(range(10**6))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    assert list(progress_bar(range(100), "encode")) == list(range(100))
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 5 and "\r" not in "".join(lines)
    assert "of 100 items" in lines[0] and "left" in lines[0]
    assert lines[-1].startswith("encode: 100 of 100 items") and "left" not in lines[-1]


def test_what_is_quick_says_nothing(capsys):
    list(progress_bar(range(100), "check"))
    assert capsys.readouterr().err == ""


def test_a_terminal_has_bars(capsys, monkeypatch):
    """Catches a terminal that is treated as a log file."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    list(progress_bar(range(3), "encode"))
    assert "\r" in capsys.readouterr().err


def test_stages_are_written_when_the_folder_is_this_runs(tmp_path):
    """Catches rows that are lost before the folder is claimed, an earlier run's that stay, a resumed run's that go."""
    file = tmp_path / "stages.jsonl"
    file.write_text('{"stage": "old"}\n')
    with stage("check", 5):
        pass
    stages.write_to(file, goes_on=False)
    with stage("load") as row:
        row["items"] = 7
    assert [json.loads(line)["stage"] for line in file.read_text().splitlines()] == ["check", "load"]
    stages.begin()
    with stage("check", 5):
        pass
    stages.write_to(file, goes_on=True)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["stage"] for row in rows] == ["check", "load", "check"]
    assert rows[1]["items"] == 7 and rows[1]["seconds"] >= 0 and rows[1]["peak_memory_gib"] > 0


def test_a_stage_inside_another_counts_once():
    """Catches time that is counted twice, and items of the inner stage that are lost."""
    with stage("encode"):
        with stage("encode", 3):
            pass
        with stage("load", 4):
            pass
    assert [(row["stage"], row["items"]) for row in stages.rows] == [("encode", 7)]


def test_a_stage_that_failed_leaves_the_next_one_whole():
    """Catches a stage that stays open, into which everything after an error would fall."""
    with pytest.raises(KeyError), stage("save"):
        raise KeyError
    with stage("validate"):
        pass
    assert [row["stage"] for row in stages.rows] == ["validate"]


def test_the_table_adds_up():
    """Catches a table that shows a stage once for each of its rows."""
    for seconds in (1.0, 3.0):
        stages.add("train", seconds, 10, 2.5)
    lines = progress.table_of_stages().splitlines()
    assert len(lines) == 3 and lines[1].split() == ["train", "4.0", "20", "5", "2.50"]
    assert lines[-1].split()[0] == "all"
