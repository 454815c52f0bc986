"""Two processes train, validate and resume as one does."""

import json
from pathlib import Path

import pytest
from helpers import column, largest_difference, launch, read_rows, run_main
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

STEPS = 6
# 8 rows a step as 2 x 2 accumulation x 2 processes; a plateau after every second validation
SPLIT = ["--train_batch_size", 2, "--gradient_accumulation_steps", 2]
FULL = ["--max_train_steps", STEPS, "--validation_steps", 1, "--improvement_threshold", 0.99, "--learning_rate", 0.004]
FULL += ["--checkpointing_steps", 3, "--lora_dropout", 0]


@pytest.fixture(scope="module")
def single(train, config, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("single")
    run_main(train, ["--config", config, "--output_dir", out, *FULL])
    return out


@pytest.fixture(scope="module")
def ddp(recipe, config, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("ddp")
    launch(recipe, "ddp", 2, ["--config", config, "--output_dir", out, *FULL, *SPLIT]).check()
    return out


def test_losses_are_those_of_one_process(ddp, single):
    """Catches processes that train alone, and a token mean that each process takes over its own rows only."""
    assert json.loads((ddp / "environment.json").read_text())["launch"] == "ddp"
    for name in ("loss", "grad_norm"):
        assert largest_difference(column(ddp, name), column(single, name)) < 1e-3, name
    assert column(ddp, "learning_rate") == column(single, "learning_rate")


def test_validation_is_that_of_one_process(ddp, single):
    """Catches losses of one process's rows only, a hang on unequal numbers of batches, decisions that differ."""
    rows, expected = (read_rows(folder / "validation.jsonl") for folder in (ddp, single))
    assert len(rows) == len(expected) == STEPS + 1
    for row, other in zip(rows, expected, strict=True):
        for name in ("validation_loss", "retention_loss"):
            assert row[name] == pytest.approx(other[name], rel=1e-3), (row["step"], name)
        for name in ("validation_accuracy", "retention_accuracy", "decision", "learning_rate_factor"):
            assert row[name] == pytest.approx(other[name], abs=0.03) if "acc" in name else row[name] == other[name]
    assert [row["decision"] for row in rows][3] == "reduce"


def test_adapters_are_equal(ddp, single):
    """Catches adapters of one process that trained alone."""
    ours, theirs = (load_file(folder / "final/adapter_model.safetensors") for folder in (ddp, single))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).abs().max() < 0.02 * tensor.abs().max() + 1e-4, name


def test_resume_is_exact(recipe, config, ddp, tmp_path):
    """Catches a resume that loses the schedule, the optimizer or the order of rows: equal to the last bit."""
    flags = [*FULL, *SPLIT, "--resume_from_checkpoint", ddp / "checkpoint-3"]
    launch(recipe, "ddp", 2, ["--config", config, "--output_dir", tmp_path, *flags]).check()
    for name in ("loss", "grad_norm", "learning_rate"):
        assert column(tmp_path, name) == column(ddp, name, from_step=4), name
    ours, theirs = (read_rows(folder / "validation.jsonl") for folder in (tmp_path, ddp))
    assert ours == theirs[4:]


def test_two_processes_go_on_as_one(train, config, ddp, tmp_path):
    """Catches a checkpoint that only as many processes can read."""
    flags = [*FULL, "--resume_from_checkpoint", ddp / "checkpoint-3"]
    run_main(train, ["--config", config, "--output_dir", tmp_path, *flags])
    assert largest_difference(column(tmp_path), column(ddp, from_step=4)) < 1e-3
