"""LoRA on a base in bf16 and in 4 bits: exact resume, the file in the unmodified pipeline, 4 bits against the whole
base, two processes against one."""

from types import SimpleNamespace

import lora_runs
import pytest
import torch
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel
from helpers import assert_equal_within_bf16, column, largest_difference, weights
from strategies import assert_same_losses, assert_same_validation

from common.model import adapters, loading
from common.start.folders import part_config

pytestmark = pytest.mark.slow
FLAGS = {"bf16": ["--use_rslora"], "nf4": ["--base_precision", "nf4", "--lora_dropout", 0.1]}
each_precision = pytest.mark.parametrize("precision", FLAGS)


@pytest.fixture(scope="module")
def runs(train, config, tmp_path_factory):
    """{base_precision: the run on it}"""
    folder = tmp_path_factory.mktemp("lora")
    return {name: lora_runs.lora_run(train, config, folder / name, *flags) for name, flags in FLAGS.items()}


def inputs(sizes: dict) -> dict:
    """Of a call of a transformer with these sizes."""
    rng = torch.Generator().manual_seed(1)
    return dict(
        hidden_states=torch.randn(1, 9, sizes["in_channels"], generator=rng),
        encoder_hidden_states=torch.randn(1, 7, sizes["joint_attention_dim"], generator=rng),
        encoder_hidden_states_mask=None,
        timestep=torch.tensor([0.4]),
        img_shapes=[[(1, 3, 3)]],
        guidance=None,
        return_dict=False,
    )


@each_precision
def test_file_gives_the_trained_model(runs, precision, settings, model_folder):
    """Catches adapters that change the base before the first step, names that diffusers does not know, a lost alpha,
    and 4-bit layers that compute something else than the weights that they stand for."""
    cfg = settings(lora_rank=4, lora_alpha=16, base_precision=precision, use_rslora=precision == "bf16")
    lora_runs.check_file(QwenImagePipeline, model_folder, runs[precision], cfg, inputs)


@each_precision
def test_resume_is_exact(runs, precision, train, config):
    """Catches adapters that begin anew, a base that is quantised into something else, a checkpoint with the base in
    it."""
    lora_runs.check_resume(train, config, runs[precision], *FLAGS[precision])


def test_learned_on_4_bits_holds_on_the_whole_base(runs, train, config, tmp_path):
    """Catches adapters that only mend what 4 bits broke."""
    lora_runs.check_on_the_whole_base(train, config, runs["nf4"], tmp_path / "whole")


def test_two_sharded_processes_are_one(runs, train, config, tmp_path):
    """Catches adapters whose gradients are not averaged, that begin otherwise on each process, or that an export of
    shards leaves out."""
    ours = lora_runs.lora_run(train, config, tmp_path / "fsdp2", *FLAGS["bf16"], strategy="fsdp2")
    assert_same_losses(ours, runs["bf16"], "fsdp2")
    assert_same_validation(ours, runs["bf16"], lora_runs.STEPS, {"000.png", "001.png", "002.png", "grid.png"}, set())
    assert_equal_within_bf16(weights(ours / "export/lora"), weights(runs["bf16"] / "export/lora"))


def test_resume_on_4_bits_with_two_processes(train, config, tmp_path):
    """Catches processes that each have another base in 4 bits after a resume, or dropout that goes on elsewhere."""
    run = lora_runs.lora_run(train, config, tmp_path / "ddp", *FLAGS["nf4"], strategy="ddp")
    lora_runs.check_resume(train, config, run, *FLAGS["nf4"], strategy="ddp")


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
