"""What the three recipes with a transformer prove of LoRA, on a base in bf16 and in 4 bits: a run of each, its file in
the unmodified pipeline, and exact resume."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from helpers import assert_equal_weights, column, launch, read_rows, run_main, weights
from torch import nn

from common.model import adapters, loading
from common.start.folders import part_config

PRECISIONS = {"bf16": ["--use_rslora"], "nf4": ["--base_precision", "nf4", "--lora_dropout", 0.1]}
each_precision = pytest.mark.parametrize("precision", PRECISIONS)
STEPS = 6
FLAGS = ["--lora_rank", 4, "--lora_alpha", 16, "--learning_rate", 0.01, "--max_train_steps", STEPS, "--export_model"]
FLAGS += ["--checkpointing_steps", 3, "--validation_steps", STEPS]
ONE_PROCESS = SimpleNamespace(
    strategy="single", launch="single", sharded=False, offload=False, benchmark=False, device=torch.device("cpu"),
    compute_dtype=torch.float32, weights_dtype=torch.float32, print=print, is_main=True, rank=0, barrier=lambda: None,
)  # fmt: skip


def lora_run(train: ModuleType, config: Path, folder: Path, *flags: object, strategy: str = "") -> Path:
    """Six steps with checkpoints at the third and the last, validation at the start and the end, an export. strategy:
    of two processes, each with half of the 16 samples; in this process without one."""
    argv = ["--config", config, "--output_dir", folder, *FLAGS, *flags]
    if strategy:
        launch(Path(train.__file__).parent, strategy, 2, [*argv, "--train_batch_size", 8]).check()
    else:
        run_main(train, argv)
    return folder


def check_resume(train: ModuleType, config: Path, run: Path, *flags: object, strategy: str = "") -> None:
    """The last three steps once more, from the checkpoint before them: losses and file are equal to the last bit."""
    rows, file, saved = read_rows(run), weights(run / "export/lora"), weights(run / f"checkpoint-{STEPS}/model")
    assert saved and all(".lora_" in name for name in saved), "a checkpoint holds adapters alone"
    shutil.rmtree(run / f"checkpoint-{STEPS}")
    shutil.rmtree(run / "export")
    lora_run(train, config, run, *flags, "--resume_from_checkpoint", "latest", strategy=strategy)
    for name in ("loss", "grad_norm"):
        assert column(run, name) == {row["step"]: row[name] for row in rows}, name
    assert len({row["loss"] for row in rows}) == STEPS
    assert_equal_weights(weights(run / "export/lora"), file)
    assert_equal_weights(weights(run / f"checkpoint-{STEPS}/model"), saved)


def adapted(model_class: type, folder: Path, cfg: object) -> nn.Module:
    """The model as a run with these settings begins with it."""
    model = loading.empty_model(model_class, part_config(folder))
    adapters.add(ONE_PROCESS, cfg, model)
    return adapters.load(ONE_PROCESS, cfg, model, folder).eval()


def rounded_to_nf4(model: nn.Module) -> nn.Module:
    """The same model, its blocks' linear weights replaced by what is left of them after 4 bits."""
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and "_blocks." in name:
            packed, state = quantize_4bit(layer.weight.data, quant_type="nf4", compress_statistics=True)
            layer.weight.data = dequantize_4bit(packed, state)
    return model


@torch.no_grad()
def check_file(pipeline_class: type, model_folder: Path, run: Path, cfg: object, make_inputs: Callable) -> None:
    """Adapters begin as the base; the pipeline with the run's file has the trained model's output, and so has what it
    merges. On 4 bits: all of that on the base as 4 bits leave it, and the file moves the whole base as far."""
    pipeline = pipeline_class.from_pretrained(model_folder)
    model_class, folder = type(pipeline.transformer), model_folder / "transformer"
    ours, trained = adapted(model_class, folder, cfg), weights(run / f"checkpoint-{STEPS}/model")
    inputs = make_inputs(part_config(folder))
    in_4_bits = cfg.lora.base_precision == "nf4"
    whole_base = pipeline.transformer(**inputs)[0]
    base = rounded_to_nf4(pipeline.transformer)(**inputs)[0] if in_4_bits else whole_base
    torch.testing.assert_close(ours(**inputs)[0], base, rtol=1e-4, atol=1e-5 if in_4_bits else 0)
    if in_4_bits:
        assert 1e-3 < distance(base, whole_base) < 0.3, "4 bits are not the weights themselves, and near them"
        assert all(p.dtype == torch.uint8 for name, p in ours.named_parameters() if name.endswith("base_layer.weight"))

    missing, unknown = ours.load_state_dict(trained, strict=False)
    assert not unknown and not [name for name in missing if ".lora_" in name]
    expected = ours(**inputs)[0]
    pipeline.load_lora_weights(run / "export/lora")
    state = pipeline.transformer.state_dict()
    for name, tensor in trained.items():
        place = state[name.replace(".default", ".default_0")]
        assert torch.equal(place.bfloat16(), tensor.bfloat16()), name
        place.copy_(tensor)  # without the rounding
    moved = distance(expected, base)
    assert moved > 0.02
    torch.testing.assert_close(pipeline.transformer(**inputs)[0], expected, rtol=1e-4, atol=1e-5)
    pipeline.fuse_lora()
    torch.testing.assert_close(pipeline.transformer(**inputs)[0], expected, rtol=1e-3, atol=1e-4)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of a from b, as a share of b."""
    return ((a - b).norm() / b.norm()).item()


def check_on_the_whole_base(train: ModuleType, config: Path, run: Path, folder: Path) -> None:
    """What was learned on 4 bits holds on the whole base: a run that goes on there, with a learning rate of 0."""
    shutil.copytree(run, folder)
    flags = ["--base_precision", "bf16", "--max_train_steps", STEPS + 1, "--learning_rate", 0]
    flags += ["--resume_from_checkpoint", "latest", "--validation_steps", STEPS + 1]
    lora_run(train, config, folder, *flags)
    assert_equal_weights(weights(folder / "export/lora"), weights(run / "export/lora"))
    first, on_4_bits, on_whole = (row["validation_loss"] for row in read_rows(folder / "validation.jsonl"))
    print(f"validation loss: {first:.5f} before, {on_4_bits:.5f} on 4 bits, {on_whole:.5f} on the whole base")
    assert on_4_bits < first and on_whole < first
    assert on_whole == pytest.approx(on_4_bits, rel=0.05)


def qwenimage_inputs(sizes: dict) -> dict:
    """Of a call of a QwenImageTransformer2DModel with these sizes."""
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


# ---- what a file of the three names, to have it


@pytest.fixture(scope="module", name="runs")
def runs_of_both(train, config, tmp_path_factory):
    """{base_precision: the run on it}"""
    folder = tmp_path_factory.mktemp("lora")
    return {name: lora_run(train, config, folder / name, *flags) for name, flags in PRECISIONS.items()}


@each_precision
def test_resume_is_exact(runs, precision, train, config):
    """Catches adapters that begin anew, a base that is quantised into something else, a checkpoint with the base in
    it."""
    check_resume(train, config, runs[precision], *PRECISIONS[precision])


def test_learned_on_4_bits_holds_on_the_whole_base(runs, train, config, tmp_path):
    """Catches adapters that only mend what 4 bits broke."""
    check_on_the_whole_base(train, config, runs["nf4"], tmp_path / "whole")
