"""Runs of several processes, and of two machines, of which one fails: all end, with one cause, and can go on."""

import os
import subprocess
import time

import many
import pytest
from helpers import read_rows, start_command, wait_for

from common.record.folder import find_checkpoint

pytestmark = pytest.mark.slow

SAVED = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("many")


@pytest.mark.parametrize(
    ("strategy", "kind", "rank", "code", "said"),
    [
        ("fsdp2", "kill", 1, "1", "error: process 1 was killed, "),
        ("zero3", "kill", 0, "1", "error: process 0 was killed, "),
        ("ddp", "raise", 1, "1", "error: RuntimeError: planted (process 1)"),
    ],
)
def test_one_fails_and_all_end(folder, tmp_path, strategy, kind, rank, code, said):
    """Catches a process that waits for hours for one that is gone: the other is in no collective that could notice,
    and takes the launcher's SIGTERM for a wish to stop. All end within ten seconds, the first cause is told to run.sh
    once, and the checkpoint before it is whole."""
    out, told = tmp_path / "out", tmp_path / "told"
    argv = [*many.flags(folder, 6, SAVED), "--output_dir", out]
    done, _ = many.launch_faulty(strategy, 2, argv, (kind, rank, SAVED + 1), RUN_EXIT_CODE_FILE=str(told))
    assert time.time() - (out / "metrics.jsonl").stat().st_mtime < 12, done.output[-3000:]
    assert [row["step"] for row in read_rows(out)] == [1, 2], done.output[-3000:]
    lines = told.read_text().splitlines()
    assert len(lines) == 2 and lines[0] == code and lines[1].startswith(said), (lines, done.output[-3000:])
    assert done.output.count("planted") == 2 * (kind == "raise")  # once in the traceback, once in its source line
    assert find_checkpoint(out, "latest") == out / f"checkpoint-{SAVED}"


@pytest.mark.parametrize(
    ("strategy", "fault", "flags", "said"),
    [
        ("fsdp2", ("mistake", 1, 0), [], "error: planted (process 1)"),
        ("zero3", (), ["--no_such_flag"], "error: these flags, or the config's, cannot be read"),
        ("ddp", (), ["--train_data_dir", "/no/such"], "error: train_data_dir /no/such is no folder"),
    ],
)
def test_a_mistake_before_the_processes_know_each_other(folder, tmp_path, strategy, fault, flags, said):
    """Catches a launcher's report of failed processes where a sentence should be, and a process that waits for hours
    for the one that has made a mistake: all end with it, told to run.sh once."""
    told = tmp_path / "told"
    argv = [*many.flags(folder, 2, 0), "--output_dir", tmp_path / "out", *flags]
    done, took = many.launch_faulty(strategy, 2, argv, fault, RUN_EXIT_CODE_FILE=str(told))
    code, sentence = told.read_text().splitlines()
    assert code == "2" and sentence.startswith(said) and done.returncode == 0, (told.read_text(), done.output[-3000:])
    assert "Error" not in done.output and done.output.count("full helptext") == flags.count("--no_such_flag")
    assert took < 90


def test_two_machines_whose_link_is_cut(folder, tmp_path):
    """Catches a machine that waits for hours for one that it cannot reach any more: both sides end and say why, and
    the checkpoint before it is whole."""
    out = tmp_path / "out"
    argv = [*many.flags(folder, 2000, SAVED), "--output_dir", out]
    try:
        with many.two_machines(f"test{os.getpid()}_") as machines:
            commands = [many.on_machine(machines, number, "fsdp2", argv, ("cut", 0, 0)) for number in range(2)]
            with start_command(commands[0]) as first, start_command(commands[1]) as second:
                wait_for(lambda: len(read_rows(out)) > SAVED or first.poll() is not None, 120, "three steps")
                subprocess.run(["ip", "-n", machines[0], "link", "set", "wire", "down"], check=True)
                said = [process.communicate(timeout=60)[0] for process in (first, second)]
    except OSError as error:
        pytest.skip(f"no network namespaces here: {error}")
    lost = "error: process {} at 10.231.7.{} was killed, for want of main memory perhaps, or is cut off"
    assert lost.format(1, 2) in said[0] and lost.format(0, 1) in said[1], said
    assert find_checkpoint(out, "latest")
