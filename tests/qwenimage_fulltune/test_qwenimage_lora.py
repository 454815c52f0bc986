"""LoRA on a base in bf16 and in 4 bits: exact resume, the file in the unmodified pipeline, 4 bits against the whole
base, two processes against one."""

from types import SimpleNamespace

import lora_runs
import pytest
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel
from helpers import assert_equal_within_bf16, column, largest_difference, weights
from lora_runs import runs_of_both, test_learned_on_4_bits_holds_on_the_whole_base, test_resume_is_exact  # noqa: F401
from strategies import assert_same_losses, assert_same_validation

from common.model import adapters, loading
from common.start.folders import part_config

pytestmark = pytest.mark.slow


@lora_runs.each_precision
def test_file_gives_the_trained_model(runs, precision, settings, model_folder):
    """Catches adapters that change the base before the first step, names that diffusers does not know, a lost alpha,
    and 4-bit layers that compute something else than the weights that they stand for."""
    cfg = settings(lora_rank=4, lora_alpha=16, base_precision=precision, use_rslora=precision == "bf16")
    lora_runs.check_file(QwenImagePipeline, model_folder, runs[precision], cfg, lora_runs.qwenimage_inputs)


def test_two_sharded_processes_are_one(runs, train, config, tmp_path):
    """Catches adapters whose gradients are not averaged, that begin otherwise on each process, or that an export of
    shards leaves out."""
    ours = lora_runs.lora_run(train, config, tmp_path / "fsdp2", *lora_runs.PRECISIONS["bf16"], strategy="fsdp2")
    assert_same_losses(ours, runs["bf16"], "fsdp2")
    assert_same_validation(ours, runs["bf16"], lora_runs.STEPS, {"000.png", "001.png", "002.png", "grid.png"}, set())
    assert_equal_within_bf16(weights(ours / "export/lora"), weights(runs["bf16"] / "export/lora"))


def test_resume_on_4_bits_with_two_processes(train, config, tmp_path):
    """Catches processes that each have another base in 4 bits after a resume, or dropout that goes on elsewhere."""
    run = lora_runs.lora_run(train, config, tmp_path / "ddp", *lora_runs.PRECISIONS["nf4"], strategy="ddp")
    lora_runs.check_resume(train, config, run, *lora_runs.PRECISIONS["nf4"], strategy="ddp")


def test_a_base_in_main_memory(runs, train, config, tmp_path):
    """Catches adapters that stream with the blocks that they are in, or a base that does not come up."""
    flags = ["--stream_blocks", -1, "--use_rslora", "--validation_steps", 0]
    streamed = lora_runs.lora_run(train, config, tmp_path, *flags)
    for name in ("loss", "grad_norm"):
        assert largest_difference(column(streamed, name), column(runs["bf16"], name)) < 1e-6, name


@pytest.mark.parametrize(
    ("changes", "flags", "sentence"),
    [
        ({"strategy": "zero2", "launch": "zero2"}, {}, "base_precision nf4 is not possible under zero2.*LAUNCH="),
        ({"sharded": True, "launch": "fsdp2"}, {}, "base_precision nf4 is not possible under fsdp2.*LAUNCH="),
        ({}, {"stream_blocks": -1}, "base_precision nf4 stays on the GPU, got stream_blocks -1 too"),
        ({}, {"lora_layers": "atn"}, r"lora_layers atn .* leaves no linear layer; expected .*attn\.to_q"),
    ],
)
def test_mistakes(settings, model_folder, changes, flags, sentence):
    """Catches 4-bit weights that a strategy would cut or flatten, and adapters on nothing."""
    cfg = settings(lora_rank=4, base_precision="nf4", **flags)
    model = loading.empty_model(QwenImageTransformer2DModel, part_config(model_folder / "transformer"))
    with pytest.raises(ValueError, match=sentence):
        adapters.add(SimpleNamespace(**{**vars(lora_runs.ONE_PROCESS), **changes}), cfg, model)
