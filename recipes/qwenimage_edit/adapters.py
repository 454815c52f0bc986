"""What trains: everything, the modules that a pattern names, or LoRA adapters (peft) that diffusers loads."""

import math
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import QwenImageEditPipeline, QwenImageTransformer2DModel
from from_videox_fun import LOW
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from common.model import loading
from common.model.ema import Ema, evaluating
from common.model.loading import Reader
from common.model.sharding import full_tensor
from common.processes import Run

LORA_TARGETS = [*(f"to_{name}" for name in "qkv"), "to_out.0", *(f"add_{name}_proj" for name in "qkv"), "to_add_out"]


def train_matching(transformer: nn.Module, patterns: Sequence[str], low: Sequence[str] = ()) -> str:
    """Only parameters whose names contain one of the patterns train ("." is in every name), or one of `low`. Says what
    matched; ValueError when a pattern matches nothing."""
    names = [name for name, _ in transformer.named_parameters()]
    for pattern in (*patterns, *low):
        if not any(pattern in name for name in names):
            examples = ", ".join(
                sorted({name.split(".")[2] for name in names if name.startswith("transformer_blocks.")})
            )
            raise ValueError(
                f"trainable_modules: no parameter's name contains {pattern!r}; expected parts of names such as "
                f'{names[0]!r} or, of the blocks, {examples}; "." is everything'
            )
    for name, parameter in transformer.named_parameters():
        parameter.requires_grad_(any(pattern in name for pattern in (*patterns, *low)))
    trained = [p.numel() for p in transformer.parameters() if p.requires_grad]
    share = trained_share(transformer)
    said = f"trains {sum(trained) / 1e6:.6g}M parameters ({share:.1%}), {len(trained)} of {len(names)} tensors"
    groups = rate_groups(transformer, patterns, low)
    return said + (f", {len(groups[-1]['params'])} of them at half the learning rate" if groups else "")


def rate_groups(transformer: nn.Module, patterns: Sequence[str], low: Sequence[str]) -> list[dict] | None:
    """Groups for the optimizer where something trains at a part of the learning rate: what `patterns` do not name."""
    groups = [{"params": []}, {"params": [], "lr_scale": LOW}]
    for name, parameter in transformer.named_parameters():
        if parameter.requires_grad:
            groups[not any(pattern in name for pattern in patterns)]["params"].append(parameter)
    return [group for group in groups if group["params"]] if low and groups[1]["params"] else None


def lora_layers(transformer: nn.Module, targets: str, skipped: str) -> tuple[list[str], str]:
    """The linear layers that get adapters: their names contain one of the targets and nothing to be skipped (both
    joined by commas); and what is to be said of targets that name none. ValueError when nothing is left."""
    layers = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    wanted, unwanted = ([part.strip() for part in text.split(",") if part.strip()] for text in (targets, skipped))
    wanted = wanted or LORA_TARGETS
    found = [name for name in layers if any(w in name for w in wanted) and not any(u in name for u in unwanted)]
    nothing = [part for part in wanted if not any(part in name for name in layers)]
    blocks = sorted({name.split(".", 2)[2] for name in layers if name.startswith("transformer_blocks.")})
    if not found:
        raise ValueError(f"target_name {targets!r} leaves no linear layer; expected parts of {', '.join(blocks)}")
    said = f"; target_name: no linear layer is called {', '.join(nothing)}, there are {', '.join(blocks)}"
    return found, said if nothing else ""


def add_lora(
    transformer: QwenImageTransformer2DModel, rank: int, alpha: int, targets: str = "", skipped: str = ""
) -> str:
    """Adapters on every attention's projections, or on other linear layers, without memory for their weights; the rest
    is frozen."""
    transformer.requires_grad_(False)
    names, said = lora_layers(transformer, targets, skipped)
    with init_empty_weights():
        modules = names if targets or skipped else LORA_TARGETS
        transformer.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=modules))
    layers = [module for module in transformer.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        layer.cast_input_dtype_enabled = False  # autocast casts the small weights instead of the activations
    assert len(layers) == len(names), f"{len(layers)} adapted layers, {len(names)} expected"
    trained = transformer.num_parameters(only_trainable=True)
    return f"trains LoRA of rank {rank} on {len(layers)} layers: {trained / 1e6:.6g}M parameters{said}"


def trained_share(transformer: nn.Module) -> float:
    """Of all parameters."""
    trained = sum(p.numel() for p in transformer.parameters() if p.requires_grad)
    return trained / sum(p.numel() for p in transformer.parameters())


def without_lora(name: str) -> str:
    """The checkpoint's name of a parameter of a model with adapters."""
    return name.replace(".base_layer.", ".")


def reader(run: Run, transformer: nn.Module, weights: Path, seed: int) -> Reader:
    """Reads the base's weights by their own names, and begins adapters, where there are any, as peft does: A uniform
    within 1 / sqrt(fan-in), B zero. Every process draws the same A."""
    names = {without_lora(name) for name in transformer.state_dict() if ".lora_" not in name}
    read = loading.weights_reader(run, weights, names, seed)

    def read_or_begin(name: str, shape: tuple[int, ...], rows: slice) -> torch.Tensor:
        if ".lora_A." in name:
            rng = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            return ((2 * torch.rand(shape, generator=rng) - 1) / math.sqrt(shape[1]))[rows]
        if ".lora_B." in name:
            return torch.zeros(shape)[rows]
        return read(without_lora(name), shape, rows)

    return read_or_begin


def export_lora(run: Run, output_dir: str | Path, model: nn.Module, ema: Ema | None) -> None:
    """export/lora, averaged weights where they are kept: pytorch_lora_weights.safetensors with alpha in its metadata,
    for a pipeline's load_lora_weights."""
    transformer, folder = run.unwrap(model), Path(output_dir) / "export" / "lora"
    with evaluating(model, ema):
        weights = {
            name.replace(".default", ""): full_tensor(parameter).to("cpu", torch.bfloat16)
            for name, parameter in transformer.named_parameters()
            if ".lora_" in name
        }
    if run.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        config = transformer.peft_config["default"].to_dict()
        config = {name: list(value) if isinstance(value, set) else value for name, value in config.items()}
        QwenImageEditPipeline.save_lora_weights(
            folder, transformer_lora_layers=weights, transformer_lora_adapter_metadata=config
        )
    run.barrier()
