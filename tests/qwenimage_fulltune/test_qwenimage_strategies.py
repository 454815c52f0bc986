"""Every launch file trains the same model: two processes against one, resume, validation, averages, exports."""

import os
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel
from helpers import (
    Launched,
    NamedRuns,
    accelerate_command,
    assert_equal_weights,
    assert_equal_within_bf16,
    column,
    largest_difference,
    launch,
    read_rows,
    start_command,
    wait_for,
    weights,
)
from PIL import Image
from strategies import (
    STRATEGIES,
    assert_opens,
    assert_same_continuation,
    assert_same_losses,
    assert_same_validation,
    needs_libaio,
)

from common.export import export

pytestmark = pytest.mark.slow

STEPS, SAVED = 6, 3
# 16 samples a step as 4 x 2 accumulation x 2 processes, against one batch of 16 in one process
SPLIT = ["--train_batch_size", 4, "--gradient_accumulation_steps", 2]
FULL = ["--validation_steps", STEPS, "--checkpointing_steps", SAVED, "--export_model"]
AVERAGED = ["--ema_decay", 0.9]  # except under zero3_nvme, which refuses it
DRAWN = {"000.png", "001.png", "002.png"}  # three prompts on two processes
WITH_NVME = [*STRATEGIES, pytest.param("zero3_nvme", marks=needs_libaio)]


class Runs(NamedRuns):
    model_folder: Path  # of the base that they begin with

    def reference(self, strategy: str = "ddp") -> Path:
        """One process with the settings of `full(strategy)`."""
        return (
            self.single("single_nvme", *FULL) if strategy == "zero3_nvme" else self.single("single", *FULL, *AVERAGED)
        )

    def full(self, strategy: str) -> Path:
        """With a cache of its own: the encoders, too, are loaded and used under this strategy."""
        flags = FULL if strategy == "zero3_nvme" else [*FULL, *AVERAGED]
        return self.launched(strategy, strategy, *SPLIT, *flags, "--cache_dir", self.folder / f"{strategy}_cache")


@pytest.fixture(scope="module")
def runs(train, recipe, config, model_folder, tmp_path_factory) -> Runs:
    runs = Runs(train, recipe, config, tmp_path_factory.mktemp("strategies"), ["--max_train_steps", STEPS])
    runs.model_folder = model_folder
    return runs


def trained_weights(runs: Runs, strategy: str, folder: Path) -> dict[str, torch.Tensor]:
    """A run's exported tensors, under zero3_nvme without those that get no gradient (the last block's text branch).

    DeepSpeed's NVMe offload updates such tensors from whatever is in its gradient buffer. Nothing depends on them.
    """
    exported = weights(folder / "export/transformer")
    if strategy != "zero3_nvme":
        return exported
    after = weights(runs.reference() / f"checkpoint-{STEPS}/model")
    before = weights(runs.model_folder / "transformer")
    unused = {name for name, tensor in before.items() if torch.equal(after[name], tensor)}
    assert len(unused) == 6, unused
    return {name: tensor for name, tensor in exported.items() if name not in unused}


# ---- one step is the same step everywhere


@pytest.mark.parametrize("strategy", WITH_NVME)
def test_losses_are_those_of_one_process(runs, strategy):
    """Catches encoders that are partitioned, processes that train alone, gradients summed or dropped, a split of the
    batch that changes noise or order."""
    assert_same_losses(runs.full(strategy), runs.reference(strategy), strategy)


def test_two_processes_are_the_larger_batch(runs):
    """Catches a step of 4 x 2 x 2 samples that is not the step of 16: the same loss and gradient norm to 1e-5."""
    ours, single = runs.full("ddp"), runs.reference()
    for name in ("loss", "grad_norm"):
        assert column(ours, name)[1] == pytest.approx(column(single, name)[1], rel=1e-5)
        assert column(ours, name)[2] == pytest.approx(column(single, name)[2], rel=1e-5)


@pytest.mark.parametrize("strategy", WITH_NVME)
def test_exports_are_equal(runs, strategy):
    """Catches an export of half the weights, of stale ones, or of the trained ones where averages are kept (EMA)."""
    ours, theirs = (
        trained_weights(runs, strategy, folder) for folder in (runs.full(strategy), runs.reference(strategy))
    )
    assert_equal_within_bf16(ours, theirs)


@pytest.mark.parametrize("strategy", ["fsdp2", "zero3"])
def test_sharded_exports_open_with_diffusers(runs, strategy, model_folder):
    """Catches an export of a sharded run that diffusers cannot read or draw with."""
    transformer = assert_opens(QwenImageTransformer2DModel, runs.full(strategy) / "export/transformer")
    pipeline = QwenImagePipeline.from_pretrained(model_folder, transformer=transformer)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a cross", height=64, width=96, num_inference_steps=2, true_cfg_scale=1.0).images[0]
    assert image.size == (96, 64)


@pytest.mark.parametrize("strategy", WITH_NVME)
def test_validation_is_that_of_one_process(runs, strategy):
    """Catches validation that fails or hangs on sharded weights ("'weight' must be 2-D"), or that uses other
    weights."""
    ours, single = runs.full(strategy), runs.reference(strategy)
    assert_same_validation(ours, single, STEPS, {"grid.png"}, DRAWN)
    assert "must be 2-D" not in runs.output[strategy]
    first, last = (
        np.asarray(Image.open(single / f"validation_images/step_{step:06d}/000.png")) for step in (0, STEPS)
    )
    assert (first != last).any()


@pytest.mark.parametrize("strategy", ["fsdp2", "zero3"])
def test_bf16_with_checkpointing(runs, strategy):
    """Catches a mismatch of bf16 and float32 gradients, and activation checkpointing that sharding breaks."""
    flags = ["--mixed_precision", "bf16", "--gradient_checkpointing", "--max_train_steps", 4]
    ours = runs.launched(f"{strategy}_bf16", strategy, *SPLIT, *flags)
    single = runs.single("single_bf16", *flags)
    assert largest_difference(column(ours), column(single)) < 0.02
    assert largest_difference(column(ours, "grad_norm"), column(single, "grad_norm")) < 0.1


def test_ddp_with_bf16_weights(runs):
    """Catches replicas that drift apart because each process rounds its bf16 weights with random bits of its own."""
    flags = ["--optimizer", "adafactor", "--mixed_precision", "bf16", "--max_train_steps", 4, "--learning_rate", 1e-4]
    ours = runs.launched("ddp_bf16", "ddp", *SPLIT, *flags)
    single = runs.single("single_adafactor_bf16", *flags)
    assert largest_difference(column(ours), column(single)) < 0.02


def test_streamed_blocks_of_two_processes(runs):
    """Catches gradients of a block that are not averaged before its update, and processes that see each other's blocks
    too early or too late in the main memory that they share: also after a resume."""
    flags = ["--optimizer", "adafactor", "--gradient_release", "--max_grad_norm", 0, "--max_train_steps", 4]
    flags += ["--checkpointing_steps", 2, "--export_model", "--checkpoints_total_limit", 0]
    streamed = ["--train_batch_size", 8, *flags, "--stream_blocks", -1]
    ours, single = runs.launched("ddp_streamed", "ddp", *streamed), runs.single("single_released", *flags)
    assert largest_difference(column(ours), column(single)) < 1e-4
    assert largest_difference(column(ours, "grad_norm"), column(single, "grad_norm")) < 1e-3
    trained = weights(ours / "export/transformer")
    assert_equal_within_bf16(trained, weights(single / "export/transformer"))
    saved = ours / "checkpoint-2"
    resumed = runs.launched("ddp_streamed_on", "ddp", *streamed, "--resume_from_checkpoint", saved)
    assert_same_continuation(resumed, ours, 2)
    assert_equal_weights(weights(resumed / "export/transformer"), trained)


def test_fsdp2_with_flash_adamw_and_gradient_release(runs, recipe, tmp_path):
    """Catches a release of sharded gradients that steps on local parts only or logs the norm of one shard, and
    averaged weights that stay after a validation when weights are kept gathered between forward and backward."""
    launch_file = tmp_path / "kept.yaml"
    text = (recipe / "accelerate/fsdp2.yaml").read_text()
    launch_file.write_text(text.replace("fsdp_reshard_after_forward: true", "fsdp_reshard_after_forward: false"))
    assert launch_file.read_text() != text
    flags = ["--optimizer", "flash_adamw", "--max_grad_norm", 0, "--validation_steps", SAVED, "--ema_decay", 0.9]
    ours = runs.launched("flash", launch_file, "--train_batch_size", 8, *flags, "--gradient_release")
    single = runs.single("single_flash", *flags)
    assert largest_difference(column(ours), column(single)) < 1e-4
    assert largest_difference(column(ours, "grad_norm"), column(single, "grad_norm")) < 1e-3


# ---- resume


def resume(runs: Runs, strategy: str, *flags: object, processes: int = 2, name: str = "") -> Path:
    checkpoint = runs.full(strategy) / f"checkpoint-{SAVED}"
    averaged = [] if strategy == "zero3_nvme" else AVERAGED
    flags = ("--resume_from_checkpoint", checkpoint, *(flags or (*SPLIT, *averaged, "--export_model")))
    return runs.launched(name or f"{strategy}_resumed", strategy, *flags, processes=processes)


@pytest.mark.parametrize("strategy", ["fsdp2", WITH_NVME[-1]])
def test_resume_is_exact(runs, strategy):
    """Catches a resume that loses moments, step counts, averages or the order of samples: equal to the last bit."""
    resumed, straight = resume(runs, strategy), runs.full(strategy)
    assert_same_continuation(resumed, straight, SAVED)
    ours, theirs = (trained_weights(runs, strategy, folder) for folder in (resumed, straight))
    assert_equal_weights(ours, theirs)


@pytest.fixture(scope="module")
def zero3_without_average(runs) -> Path:
    """ZeRO-3 resumed without averaged weights, so that its export holds what its checkpoint holds."""
    flags = [*SPLIT, "--checkpointing_steps", STEPS, "--export_model"]
    return resume(runs, "zero3", *flags, name="zero3_without_average")


def test_resume_is_exact_zero3(runs, zero3_without_average):
    """Catches a ZeRO-3 resume that loses master weights, moments or the order of samples: equal to the last bit."""
    assert_same_continuation(zero3_without_average, runs.full("zero3"), SAVED)


def test_a_zero3_checkpoint_without_average_is_the_export(zero3_without_average, tmp_path):
    """Catches a conversion with other names, shapes, padding or rounding than the export, and one of half the
    weights."""
    export(zero3_without_average / f"checkpoint-{STEPS}", tmp_path / "out")
    ours, theirs = weights(tmp_path / "out"), weights(zero3_without_average / "export/transformer")
    assert_equal_weights(ours, theirs)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero2", "zero3"])
def test_an_exported_checkpoint_is_the_runs_export(runs, strategy, tmp_path):
    """Catches a checkpoint that is read wrongly without its processes: names, padding, the order of shards and of
    averages, averaged and trained weights mistaken for each other."""
    checkpoint = runs.full(strategy) / f"checkpoint-{STEPS}"
    export(checkpoint, tmp_path / "average")
    assert_equal_weights(weights(tmp_path / "average"), weights(runs.full(strategy) / "export/transformer"))
    assert_opens(QwenImageTransformer2DModel, tmp_path / "average")
    export(checkpoint, tmp_path / "last", weights="last")
    trained = {n: t.bfloat16() for n, t in weights(runs.reference() / f"checkpoint-{STEPS}/model").items()}
    assert_equal_within_bf16(weights(tmp_path / "last"), trained)
    assert any(not torch.equal(t, weights(tmp_path / "average")[n]) for n, t in weights(tmp_path / "last").items())


def test_fsdp2_goes_on_with_another_number_of_processes(runs):
    """Catches a resume on one process of what two have saved that loses or repeats samples."""
    flags = ["--train_batch_size", 4, "--gradient_accumulation_steps", 4]
    resumed = resume(runs, "fsdp2", *flags, processes=1, name="fsdp2_on_one")
    straight = column(runs.full("fsdp2"), from_step=SAVED + 1)
    assert largest_difference(column(resumed), straight) < 1e-5
    expected = column(runs.full("fsdp2"), "latents_mean", SAVED + 1)
    assert largest_difference(column(resumed, "latents_mean"), expected) < 1e-5


@pytest.mark.parametrize(
    ("source", "strategy", "processes"),
    [("zero3", "zero3", 1), ("zero3", "fsdp2", 4), ("single", "zero3", 2), ("fsdp2", "single", 1)],
)
def test_a_checkpoint_goes_on_elsewhere(runs, source, strategy, processes):
    """Catches weights, moments, step counts or averages that are lost, cut or put together wrongly under another
    launch file or number of processes: the losses are those of the straight run, and so is what is exported."""
    straight = runs.reference() if source == "single" else runs.full(source)
    flags = ["--resume_from_checkpoint", straight / f"checkpoint-{SAVED}", *AVERAGED, "--export_model"]
    flags += ["--train_batch_size", 4, "--gradient_accumulation_steps", 4 // processes]
    name = f"{source}_on_{strategy}_{processes}"
    if strategy == "single":
        resumed = runs.single(name, *flags)
    else:
        resumed = runs.launched(name, strategy, *flags, processes=processes)
    for name in ("loss", "grad_norm"):
        expected = column(straight, name, from_step=SAVED + 1)
        assert largest_difference(column(resumed, name), expected) < 1e-5, name
    expected = column(straight, "latents_mean", SAVED + 1)
    assert column(resumed, "latents_mean") == pytest.approx(expected, abs=1e-6, rel=0)
    assert_equal_within_bf16(weights(resumed / "export/transformer"), weights(straight / "export/transformer"))


def test_sigterm_to_two_processes(runs, recipe, config, tmp_path):
    """Catches a stop signal on which the processes disagree, hang or die unsaved: they save one step, and resume
    exactly."""
    steps = 40
    argv = ["--config", config, *SPLIT, "--max_train_steps", steps]
    straight = launch(recipe, "ddp", 2, [*argv, "--output_dir", tmp_path / "straight"]).check()
    assert "stopped" not in straight.output
    out = tmp_path / "stopped"
    command = accelerate_command(recipe, "ddp", 2, [*argv, "--output_dir", out, "--checkpointing_steps", 1000])
    with start_command(command) as process:
        wait_for(lambda: len(read_rows(out)) >= 2 or process.poll() is not None, 300, "two steps")
        os.killpg(process.pid, signal.SIGTERM)  # as a scheduler does: every process gets it
        output, _ = process.communicate(timeout=120)
    (checkpoint,) = out.glob("checkpoint-*")
    step = int(checkpoint.name.split("-")[1])
    assert 2 <= step < steps and f"stopped at step {step} as asked" in output, output
    assert len(read_rows(out)) == step and not subprocess.run(["pgrep", "-g", str(process.pid)]).returncode == 0
    flags = ["--output_dir", out, "--resume_from_checkpoint", "latest"]
    resumed = launch(recipe, "ddp", 2, [*argv, *flags]).check()
    assert f"at step {step}" in resumed.output
    for name in ("loss", "grad_norm"):
        assert column(out, name) == column(tmp_path / "straight", name)


# ---- what cannot be


def test_refusals_of_a_launch_file(runs, config, recipe, tmp_path):
    """Catches an optimizer that trains wrongly under a strategy: one sentence, no traceback of ours, a failed
    command."""
    argv = ["--config", config, "--output_dir", tmp_path, "--optimizer", "adafactor"]
    done: Launched = launch(recipe, "fsdp2", 2, argv)
    lines = [line for line in done.output.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0 and len(lines) == 1, done.output
    assert "adafactor cannot run under fsdp2" in lines[0] and "use flash_adamw" in lines[0]
    assert f'File "{recipe}' not in done.output
