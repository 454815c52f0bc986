"""Two processes under DDP and under ZeRO-2 with the optimizer in RAM train what one process trains, three modes and
all."""

import json
from pathlib import Path

import pytest
import torch
from helpers import NamedRuns, column, largest_difference, read_rows, weights

pytestmark = pytest.mark.slow

STEPS, SAVED = 4, 2
STRATEGIES = ["ddp", "zero2"]
FULL = ["--max_train_steps", STEPS, "--checkpointing_steps", SAVED, "--validation_steps", STEPS, "--random_flip"]
# 8 samples a step, as one micro-batch of 8 against 4 on each of two processes
SPLIT = ["--train_batch_size", 4]
# and as two micro-batches of 4 against 2 x 2 on each of two processes: six backwards a step
ACCUMULATED = ["--train_batch_size", 4, "--gradient_accumulation_steps", 2, "--max_train_steps", STEPS]
SPLIT_ACCUMULATED = ["--train_batch_size", 2, "--gradient_accumulation_steps", 2, "--max_train_steps", STEPS]


@pytest.fixture(scope="module")
def runs(train, recipe, config, tmp_path_factory) -> NamedRuns:
    return NamedRuns(train, recipe, config, tmp_path_factory.mktemp("strategies"))


def adapter_weights(folder: Path) -> dict[str, torch.Tensor]:
    return weights(folder / "export/adapter")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_three_modes_are_those_of_one_process(runs, strategy):
    """Catches gradients of all modes but the last that are dropped, modes that are counted twice, a parameter that DDP
    waits for or marks twice, negatives of one process only or without gradient, and processes that train alone."""
    ours, single = runs.launched(strategy, strategy, *FULL, *SPLIT), runs.single("single", *FULL)
    assert json.loads((ours / "environment.json").read_text())["processes"] == 2
    for name in ("loss", "generation_loss", "captioning_loss", "retrieval_loss"):
        assert largest_difference(column(ours, name), column(single, name)) < 1e-3, name
    assert column(ours, "grad_norm")[1] == pytest.approx(column(single, "grad_norm")[1], rel=1e-5)
    assert largest_difference(column(ours, "grad_norm"), column(single, "grad_norm")) < 5e-3
    theirs = adapter_weights(single)
    for name, tensor in adapter_weights(ours).items():
        assert torch.allclose(tensor, theirs[name], rtol=0.02, atol=2e-4), name


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_accumulated_three_modes(runs, strategy):
    """Catches accumulation that the modes' micro-steps end too early, or whose gradients but the last mode's are lost
    between micro-batches."""
    ours = runs.launched(f"{strategy}_accumulated", strategy, *SPLIT_ACCUMULATED)
    single = runs.single("single_accumulated", *ACCUMULATED)
    for name in ("loss", "generation_loss", "captioning_loss", "retrieval_loss"):
        assert largest_difference(column(ours, name), column(single, name)) < 1e-3, name
    assert column(ours, "grad_norm")[1] == pytest.approx(column(single, "grad_norm")[1], rel=1e-4)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_validation_is_that_of_one_process(runs, strategy):
    """Catches a held-out loss of one process's rows, and pictures that are drawn twice or not at all."""
    ours, single = runs.launched(strategy, strategy, *FULL, *SPLIT), runs.single("single", *FULL)
    rows, expected = (read_rows(folder / "validation.jsonl") for folder in (ours, single))
    assert [row["step"] for row in rows] == [row["step"] for row in expected] == [0, STEPS]
    for row, other in zip(rows, expected, strict=True):
        assert row["validation_loss"] == pytest.approx(other["validation_loss"], rel=1e-4)
    names = [
        {file.name for file in (folder / f"validation_images/step_{STEPS:06d}").iterdir()} for folder in (ours, single)
    ]
    assert names[0] == names[1]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_resume_is_exact(runs, strategy):
    """Catches a queue, heads, master weights or moments that a checkpoint forgets. DDP: equal to the last bit.
    DeepSpeed's CPU Adam multiplies its bias correction up step by step, and computes it by a power after a restart:
    there the first step is equal to the bit, and the next one to the rounding of that."""
    straight = runs.launched(strategy, strategy, *FULL, *SPLIT)
    flags = ["--max_train_steps", STEPS, "--random_flip", *SPLIT]
    flags += ["--resume_from_checkpoint", straight / f"checkpoint-{SAVED}"]
    resumed = runs.launched(f"{strategy}_resumed", strategy, *flags)
    tolerance = 0 if strategy == "ddp" else 1e-5
    for name in ("loss", "grad_norm", "retrieval_loss"):
        ours, theirs = column(resumed, name), column(straight, name, from_step=SAVED + 1)
        assert ours[SAVED + 1] == theirs[SAVED + 1], name
        assert largest_difference(ours, theirs) <= tolerance, name
    ours, theirs = adapter_weights(resumed), adapter_weights(straight)
    assert all(torch.allclose(ours[name], theirs[name], rtol=0, atol=tolerance) for name in theirs)


def test_zero2_in_bf16(runs):
    """Catches a module that DeepSpeed casts to bf16 under float32 inputs, and masters that do not move."""
    flags = ["--mixed_precision", "bf16", "--gradient_checkpointing", *SPLIT, "--max_train_steps", STEPS]
    ours = runs.launched("zero2_bf16", "zero2", *flags)
    single = runs.single("single_bf16", "--mixed_precision", "bf16", "--max_train_steps", STEPS)
    assert largest_difference(column(ours), column(single)) < 0.05
