"""Every launch file trains the same model, with and without reference images: two processes against one, resume,
validation, averages, exports."""

from pathlib import Path

import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
from helpers import (
    NamedRuns,
    assert_equal_weights,
    assert_equal_within_bf16,
    column,
    largest_difference,
    launch,
    read_rows,
    weights,
)
from strategies import (
    assert_opens,
    assert_same_continuation,
    assert_same_losses,
    assert_same_validation,
    needs_libaio,
)

from common.export import export

pytestmark = pytest.mark.slow

STRATEGIES = ["ddp", "fsdp2", "zero2", "zero3", "zero3_offload"]  # qwenimage_fulltune runs all

STEPS, SAVED = 4, 2
# 16 samples a step as 4 x 2 accumulation x 2 processes, against one batch of 16 in one process
SPLIT = ["--train_batch_size", 4, "--gradient_accumulation_steps", 2]
FULL = ["--validation_steps", STEPS, "--checkpointing_steps", SAVED, "--export_model", "--ema_decay", 0.9]
DRAWN = {"000.png", "001.png", "002.png"}  # three prompts on two processes
SOURCES = {"000_source_0.png", "001_source_0.png", "001_source_1.png", "002_source_0.png"}


class Runs(NamedRuns):
    def reference(self) -> Path:
        """One process with the settings of `full`."""
        return self.single("single", *FULL)

    def full(self, strategy: str) -> Path:
        """With a cache of its own: the encoders, too, are loaded and used under this strategy."""
        return self.launched(strategy, strategy, *SPLIT, *FULL, "--cache_dir", self.folder / f"{strategy}_cache")


@pytest.fixture(scope="module")
def runs(train, recipe, config, tmp_path_factory) -> Runs:
    return Runs(train, recipe, config, tmp_path_factory.mktemp("strategies"), ["--max_train_steps", STEPS])


# ---- one step is the same step everywhere


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_losses_are_those_of_one_process(runs, strategy):
    """Catches encoders that are partitioned, processes that train alone, gradients summed or dropped, a split of the
    batch that changes noise or order."""
    assert_same_losses(runs.full(strategy), runs.reference(), strategy)


@needs_libaio
def test_losses_under_zero3_nvme(runs):
    """Catches a launch file that no longer fits: it refuses averaged weights, so it runs on its own."""
    nvme = runs.launched("zero3_nvme", "zero3_nvme", *SPLIT, "--checkpointing_steps", SAVED, "--export_model")
    assert largest_difference(column(nvme), column(runs.reference())) < 1e-4
    assert (nvme / "export/transformer/config.json").is_file()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_exports_are_equal(runs, strategy):
    """Catches an export of half the weights, of stale ones, or of the trained ones where averages are kept (EMA)."""
    ours, theirs = (weights(folder / "export/transformer") for folder in (runs.full(strategy), runs.reference()))
    assert_equal_within_bf16(ours, theirs)


@pytest.mark.parametrize("strategy", ["fsdp2", "zero3"])
def test_sharded_exports_open_with_diffusers(runs, strategy, model_folder):
    """Catches an export of a sharded run that diffusers cannot read or draw with."""
    transformer = assert_opens(Flux2Transformer2DModel, runs.full(strategy) / "export/transformer")
    pipeline = Flux2KleinPipeline.from_pretrained(model_folder, transformer=transformer)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(prompt="a cross", height=64, width=96, num_inference_steps=2, max_sequence_length=32).images[0]
    assert image.size == (96, 64)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_validation_is_that_of_one_process(runs, strategy):
    """Catches validation that fails or hangs on sharded weights ("'weight' must be 2-D"), or that uses other weights
    or reference images."""
    assert_same_validation(runs.full(strategy), runs.reference(), STEPS, SOURCES | {"grid.png"}, DRAWN)
    assert "must be 2-D" not in runs.output[strategy]


@pytest.mark.parametrize("strategy", ["fsdp2", "zero3"])
def test_bf16_with_checkpointing(runs, strategy):
    """Catches a mismatch of bf16 and float32, in gradients (float32 shards with bf16 compute) or in the validation's
    pipeline, and activation checkpointing that sharding breaks."""
    flags = ["--mixed_precision", "bf16", "--gradient_checkpointing", "--validation_steps", STEPS]
    ours = runs.launched(f"{strategy}_bf16", strategy, *SPLIT, *flags)
    single = runs.single("single_bf16", *flags)
    assert largest_difference(column(ours), column(single)) < 0.02
    assert largest_difference(column(ours, "grad_norm"), column(single, "grad_norm")) < 0.1
    rows, expected = (read_rows(folder / "validation.jsonl") for folder in (ours, single))
    for row, other in zip(rows, expected, strict=True):
        assert row["validation_loss"] == pytest.approx(other["validation_loss"], rel=0.02)
    assert (ours / f"validation_images/step_{STEPS:06d}/grid.png").is_file()


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_deepspeed_knows_the_micro_batch(runs, strategy):
    """Catches what a batch sampler hides from DeepSpeed, and settings of its own that win over the config's: the
    engine's config and its count of samples are in its checkpoint."""
    files = list((runs.full(strategy) / f"checkpoint-{SAVED}").rglob("*_model_states.pt"))
    assert files
    for file in files:
        engine = torch.load(file, map_location="cpu", weights_only=False)
        expected = {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2, "gradient_clipping": 1.0}
        assert expected.items() <= engine["ds_config"].items(), engine["ds_config"]
        assert engine["global_steps"] == SAVED and engine["global_samples"] == SAVED * 16


# ---- resume


def resume(runs: Runs, strategy: str, *flags: object) -> Path:
    checkpoint = runs.full(strategy) / f"checkpoint-{SAVED}"
    return runs.launched(f"{strategy}_resumed", strategy, *SPLIT, "--resume_from_checkpoint", checkpoint, *flags)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_resume_is_exact(runs, strategy):
    """Catches a resume that loses moments, step counts, averages or the order of samples: equal to the last bit."""
    resumed, straight = resume(runs, strategy, "--export_model", "--ema_decay", 0.9), runs.full(strategy)
    assert_same_continuation(resumed, straight, SAVED)
    ours, theirs = (weights(folder / "export/transformer") for folder in (resumed, straight))
    assert_equal_weights(ours, theirs)


def test_resume_is_exact_zero3(runs, tmp_path):
    """Catches a ZeRO-3 resume that loses master weights, moments or the order of samples: equal to the last bit; and,
    without averaged weights, a conversion of its checkpoint that differs from its export."""
    resumed = resume(runs, "zero3", "--checkpointing_steps", STEPS, "--export_model")
    assert_same_continuation(resumed, runs.full("zero3"), SAVED)
    export(resumed / f"checkpoint-{STEPS}", tmp_path)
    ours, theirs = weights(tmp_path), weights(resumed / "export/transformer")
    assert_equal_weights(ours, theirs)
    Flux2Transformer2DModel.from_pretrained(tmp_path)


# ---- what cannot be


def test_8bit_adam_is_refused_where_state_is_sharded(runs, config, recipe, tmp_path):
    """Catches an optimizer that trains wrongly under a strategy: one sentence with the reason, no traceback of
    ours."""
    argv = ["--config", config, "--output_dir", tmp_path, "--optimizer", "adamw_8bit"]
    done = launch(recipe, "zero3", 2, argv)
    lines = [line for line in done.output.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0 and len(lines) == 1, done.output
    assert "adamw_8bit cannot run under zero3" in lines[0] and "blocks that do not follow the shards" in lines[0]
    assert f'File "{recipe}' not in done.output
