"""A sample of campaigns/long_run.py: what a run keeps in memory and open does not grow with its steps."""

import json
from itertools import pairwise

import many
import psutil
import pytest
from helpers import load_script, run_main

from common.record.folder import read_thinned


@pytest.mark.slow
def test_memory_and_file_handles_stay_flat(tmp_path):
    """Catches a validation, a save or a step that leaves a file open or keeps what it made: ten of each, 300 steps."""
    process, seen = psutil.Process(), {}

    def look(step):
        seen[step] = process.memory_info().rss / 1e6, process.num_fds()

    flags = [*many.flags(tmp_path, 300, 30), "--output_dir", tmp_path / "run", "--train_batch_size", 1]
    flags += ["--validation_steps", 30, "--num_validation_samples", 1, "--num_inference_steps", 2]
    at_step = {step: lambda step=step: look(step) for step in (100, 300)}
    run_main(load_script(many.RECIPE / "train.py"), flags, at_step)
    (memory, handles), (memory_later, handles_later) = seen[100], seen[300]
    assert handles_later - handles <= 2 and memory_later - memory < 60, seen


@pytest.mark.parametrize("count", [1, 2000, 2001, 9999])
def test_what_is_drawn_is_bounded(count, tmp_path):
    """Catches curves drawn from all rows of a long run, which memory then grows with, and a last row left out."""
    rows = [{"step": step} for step in range(count)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    steps = [row["step"] for row in read_thinned(tmp_path / "metrics.jsonl")]
    assert steps[0] == 0 and steps[-1] == count - 1 and min(count, 1000) <= len(steps) <= 2001
    assert len({after - before for before, after in pairwise(steps[:-1])}) <= 1  # evenly spread
