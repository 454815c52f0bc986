"""How runs end when they are asked to, through run.sh: a checkpoint, no orphans, and exit codes that a scheduler can
read."""

import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from helpers import RECIPES, ROOT, read_rows, run_command, start_command, wait_for

from common.processes import DiskFull
from common.record import checkpoint, integrity

RECIPE = RECIPES[0]
FLAGS = ["--validation_steps", 0, "--max_train_steps", 4000, "--checkpointing_steps", 4000, "--train_batch_size", 4]


WAITS = """
import sys, time
from common.processes import stop
from common.start import launch
launch._handle_signals()
stop.is_training = sys.argv[1] == "training"
print("ready", flush=True)
time.sleep(3)
print("asked" if stop.asked else "", flush=True)
"""


@pytest.mark.parametrize(("stage", "code", "said"), [("encoding", 75, ""), ("training", 0, "asked\n")])
def test_before_the_first_step_a_signal_ends_the_run_at_once(stage, code, said):
    """Catches a run that checks and encodes for hours after it was asked to stop, and one that stops within a step."""
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS, stage], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (code, said), errors
    assert ("stopped as asked, before the first step" in errors) == (code == 75)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launch", "asked"),
    [("single", signal.SIGHUP), ("ddp", signal.SIGUSR1), ("fsdp2", signal.SIGINT), ("zero3", signal.SIGTERM)],
    ids=["single HUP", "ddp USR1", "fsdp2 INT", "zero3 TERM"],
)
def test_a_signal_ends_in_a_checkpoint(launch, asked, tmp_path, tmp_path_factory):
    """Catches a signal that kills the launcher and leaves its workers, loses the run, or looks like a failure: every
    signal saves, exit code 75 says that the run can go on, and nothing is left behind."""
    cache = tmp_path_factory.getbasetemp() / "cache_of_stops"
    flags = ["tiny", "--output_dir", tmp_path, "--cache_dir", cache, "--ema_decay", 0, *FLAGS]
    processes = "1" if launch == "single" else "2"
    with start_command(["bash", RECIPE / "run.sh", *flags], LAUNCH=launch, NPROC=processes) as p:
        try:
            wait_for(lambda: len(read_rows(tmp_path)) >= 3 or p.poll() is not None, 300, "three steps")
            p.send_signal(asked)
            output, _ = p.communicate(timeout=120)
            left = subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True).stdout
        finally:
            subprocess.run(["pkill", "-KILL", "-f", str(tmp_path)], check=False)
    assert p.returncode == 75, output[-3000:]
    assert left == b"", "processes that outlived run.sh"
    (saved,) = tmp_path.glob("checkpoint-*")
    assert not integrity.damage(saved, hashes=True)
    assert int(saved.name.split("-")[1]) == read_rows(tmp_path)[-1]["step"] and "as asked" in output
    assert "Traceback" not in output.split("as asked")[0]


@pytest.mark.slow
def test_a_mistake_has_its_code_under_a_launcher(tmp_path):
    """Catches a mistake that a scheduler would take for a crash, and a launcher's report around its sentence: exit
    code 2 from run.sh."""
    done = run_command(
        ["bash", RECIPE / "run.sh", "tiny", "--output_dir", tmp_path, "--resolution", 100], LAUNCH="ddp", NPROC="2"
    )
    assert done.returncode == 2 and "Traceback" not in done.output, done.output[-3000:]
    assert done.output.splitlines()[-1].startswith("error: resolution must be a positive multiple of 32")


def test_a_full_disk_says_what_is_whole(monkeypatch, tmp_path):
    """Catches half a checkpoint that stays on a full disk, and a traceback where a sentence should be."""
    whole = tmp_path / "checkpoint-5"
    whole.mkdir()
    (whole / "trainer_state.json").write_text("{}")
    integrity.seal(whole)

    def fails(run, output_dir, step, *arguments):
        (tmp_path / f"checkpoint-{step}.partial").mkdir()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_checkpoint", fails)
    monkeypatch.setattr(checkpoint.rules, "flat", lambda cfg: {})
    state, stopped = checkpoint.State(0, [], "", {}), SimpleNamespace(stop_requested=lambda: True)
    run = SimpleNamespace(output_dir=str(tmp_path), checkpoints_total_limit=2, checkpointing_steps=9)
    sampler = SimpleNamespace(segments_at=lambda step: [])
    with pytest.raises(DiskFull, match=r"is full at step 9; whole checkpoints: checkpoint-5"):
        checkpoint.save_if_due(stopped, SimpleNamespace(run=run), None, None, None, sampler, state, 9)
    assert not list(tmp_path.glob("*.partial"))
