"""Two launch files train the same model on pictures and edits: two processes against one, resume, validation."""

from pathlib import Path

import pytest
from diffusers import QwenImage21Transformer2DModel
from helpers import NamedRuns, assert_equal_weights, assert_equal_within_bf16, weights
from strategies import assert_opens, assert_same_continuation, assert_same_losses, assert_same_validation

pytestmark = pytest.mark.slow

STEPS, SAVED = 6, 3
FLAGS = ["--validation_steps", STEPS, "--checkpointing_steps", SAVED, "--export_model", "--ema_decay", 0.9]
FLAGS += ["--caption_dropout", 0]  # captions of one length: a step is the same however it is split
PICTURES = {"grid.png"}
EACH = pytest.mark.parametrize("strategy", ["fsdp2", "zero3"])


class Runs(NamedRuns):
    def reference(self) -> Path:
        return self.single("single", "--gradient_accumulation_steps", 2, *FLAGS)

    def full(self, strategy: str) -> Path:
        return self.launched(strategy, strategy, *FLAGS)


@pytest.fixture(scope="module")
def runs(train, recipe, config, tmp_path_factory) -> Runs:
    return Runs(train, recipe, config, tmp_path_factory.mktemp("strategies"), ["--max_train_steps", STEPS])


@EACH
def test_losses_are_those_of_one_process(runs, strategy):
    """Catches encoders that are partitioned, processes that train alone, micro-batches of other kinds."""
    assert_same_losses(runs.full(strategy), runs.reference(), strategy)


@EACH
def test_exports_are_equal(runs, strategy):
    """Catches an export of half the weights, or of the trained ones where averages are kept."""
    ours, theirs = (weights(folder / "export/transformer") for folder in (runs.full(strategy), runs.reference()))
    assert_equal_within_bf16(ours, theirs)
    assert_opens(QwenImage21Transformer2DModel, runs.full(strategy) / "export/transformer")


@EACH
def test_validation_is_that_of_one_process(runs, strategy):
    """Catches validation that fails or hangs on sharded weights, with the pipeline's cache of keys and values."""
    assert_same_validation(runs.full(strategy), runs.reference(), STEPS, PICTURES, {"000.png", "001.png"})


def test_resume_is_exact(runs):
    """Catches a resume that loses moments, averages, or the order of pictures and edits: equal to the last bit."""
    checkpoint = runs.full("fsdp2") / f"checkpoint-{SAVED}"
    resumed = runs.launched("resumed", "fsdp2", *FLAGS, "--resume_from_checkpoint", checkpoint)
    assert_same_continuation(resumed, runs.full("fsdp2"), SAVED)
    ours, theirs = (weights(folder / "export/transformer") for folder in (resumed, runs.full("fsdp2")))
    assert_equal_weights(ours, theirs)
