"""Every launch file trains the same model, with one source and with two: two processes against one, resume,
validation, averages, exports, LoRA; and VideoX-Fun's own launch lines start train.py."""

import re
import sys
from pathlib import Path

import pytest
from diffusers import QwenImageEditPlusPipeline, QwenImageTransformer2DModel
from helpers import (
    NamedRuns,
    assert_equal_weights,
    assert_equal_within_bf16,
    launch,
    run_command,
    weights,
)
from strategies import (
    assert_opens,
    assert_same_continuation,
    assert_same_losses,
    assert_same_validation,
)

pytestmark = pytest.mark.slow

STRATEGIES = ["ddp", "fsdp2", "fsdp2_offload", "zero3"]  # qwenimage_fulltune runs all

STEPS, SAVED = 4, 2
# 8 samples a step as 2 x 2 accumulation x 2 processes, against one batch of 8 in one process
SPLIT = ["--train_batch_size", 2, "--gradient_accumulation_steps", 2]
FULL = ["--validation_steps", STEPS, "--checkpointing_steps", SAVED, "--export_model", "--ema_decay", 0.9]
# without decay: the last block's text branch gets no gradient, which DeepSpeed takes for zeros and decays all the same
LORA = ["--adam_weight_decay", 0, "--lora_rank", 4, "--lora_alpha", 16, "--learning_rate", 0.01]
LORA += ["--validation_steps", STEPS, "--export_model"]
PICTURES = {"000.png", "001.png", "000_source_1.png", "001_source_0.png", "001_target.png", "grid.png"}


class Runs(NamedRuns):
    def reference(self) -> Path:
        """One process with the settings of `full`."""
        return self.single("single", *FULL)

    def full(self, strategy: str) -> Path:
        """ZeRO-3, DDP and FSDP2 with a cache of their own: the encoders, too, are loaded and used under them."""
        alone = ["--cache_dir", self.folder / f"{strategy}_cache"] if strategy in ("ddp", "fsdp2", "zero3") else []
        return self.launched(strategy, strategy, *SPLIT, *FULL, *alone)


@pytest.fixture(scope="module")
def runs(train, recipe, config, tmp_path_factory) -> Runs:
    return Runs(train, recipe, config, tmp_path_factory.mktemp("strategies"), ["--max_train_steps", STEPS])


# ---- one step is the same step everywhere


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_losses_are_those_of_one_process(runs, strategy):
    """Catches encoders that are partitioned, processes that train alone, gradients summed or dropped, a split of the
    batch that changes noise or order, sources of another process's rows."""
    assert_same_losses(runs.full(strategy), runs.reference(), strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_exports_are_equal(runs, strategy):
    """Catches an export of half the weights, of stale ones, or of the trained ones where averages are kept (EMA)."""
    ours, theirs = (weights(folder / "export/transformer") for folder in (runs.full(strategy), runs.reference()))
    assert_equal_within_bf16(ours, theirs)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_validation_is_that_of_one_process(runs, strategy):
    """Catches validation that fails or hangs on sharded weights ("'weight' must be 2-D"), or that uses other weights,
    sources or targets, or shows no sources and targets."""
    assert_same_validation(runs.full(strategy), runs.reference(), STEPS, PICTURES, drawn=set())
    assert "must be 2-D" not in runs.output[strategy]


@pytest.mark.parametrize("strategy", ["fsdp2", "zero3"])
def test_sharded_exports_open_with_diffusers(runs, strategy):
    """Catches an export of a sharded run that diffusers cannot read."""
    assert_opens(QwenImageTransformer2DModel, runs.full(strategy) / "export/transformer")


# ---- resume, conversion


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero3"])
def test_resume_is_exact(runs, strategy, tmp_path):
    """Catches a resume that loses master weights, moments, averages or the order of samples: equal to the last bit;
    and a conversion of a ZeRO-3 checkpoint that differs from the run's own export."""
    checkpoint = runs.full(strategy) / f"checkpoint-{SAVED}"
    average = [] if strategy == "zero3" else ["--ema_decay", 0.9]
    flags = [*SPLIT, "--resume_from_checkpoint", checkpoint, "--checkpointing_steps", STEPS, "--export_model"]
    resumed, straight = runs.launched(f"{strategy}_resumed", strategy, *flags, *average), runs.full(strategy)
    assert_same_continuation(resumed, straight, SAVED)
    ours = weights(resumed / "export/transformer")
    theirs = weights(straight / "export/transformer")
    if strategy == "zero3":
        command = [sys.executable, "-m", "common.zero_to_bf16", resumed / f"checkpoint-{STEPS}", tmp_path]
        run_command(
            [*command, "--max_shard_size", "80GB", "--safe_serialization"], PYTHONPATH=str(runs.recipe.parents[1])
        ).check()
        theirs = weights(tmp_path)
        QwenImageTransformer2DModel.from_pretrained(tmp_path)
    assert_equal_weights(ours, theirs)


# ---- LoRA


@pytest.mark.parametrize("strategy", ["fsdp2", "zero2"])
def test_lora(runs, strategy, model_folder):
    """Catches adapters that are begun, sharded, averaged, gathered or exported otherwise than in one process, and a
    frozen base whose gradients stop the run."""
    ours = runs.launched(f"{strategy}_lora", strategy, *SPLIT, *LORA)
    single = runs.single("single_lora", *LORA)
    assert_same_losses(ours, single)
    assert_same_validation(ours, single, STEPS, PICTURES, drawn=set())
    assert_equal_within_bf16(*(weights(folder / "export/lora") for folder in (ours, single)))
    pipeline = QwenImageEditPlusPipeline.from_pretrained(model_folder)
    pipeline.load_lora_weights(ours / "export/lora")
    assert pipeline.transformer.peft_config["default_0"].lora_alpha == 16


# ---- mistakes


def test_a_mistake_is_said_once(runs, config, recipe, tmp_path):
    """Catches a mistake in the data that every process reports, or of which one process waits for ever."""
    argv = ["--config", config, "--output_dir", tmp_path, "--train_mode", "qwen_image_edit"]
    done = launch(recipe, "ddp", 2, argv)
    assert done.returncode != 0 and len(re.findall("2 sources, and qwen_image_edit takes one", done.output)) == 10
    assert len([line for line in done.output.splitlines() if line.startswith("error: ")]) == 1
    assert f'File "{recipe}' not in done.output
