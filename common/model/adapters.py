"""LoRA adapters (peft) on a frozen base in bf16 or in 4 bits. export.py writes them for diffusers."""

import math
import zlib
from pathlib import Path

import torch
from accelerate import init_empty_weights
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from common.model import loading
from common.model.loading import Model, Reader
from common.processes import Run
from common.settings import Adapted, Lora


def add(run: Run, cfg: Adapted, model: nn.Module) -> None:
    """Freeze a model without weights and put adapters on it, where lora_rank asks for them; says what trains.

    With base_precision nf4 the linear layers of its blocks are to be filled in 4 bits. ValueError where that is not
    possible.
    """
    if not cfg.lora.lora_rank:
        return
    if cfg.lora.base_precision == "nf4":
        _refuse_nf4(run, cfg)
        from common.model.nf4 import quantize_blocks

        quantize_blocks(model, run.compute_dtype)
    run.print(add_lora(model, cfg.lora))


def _refuse_nf4(run: Run, cfg: Adapted) -> None:
    if run.sharded or run.strategy == "zero2":
        raise ValueError(
            f"base_precision nf4 is not possible under {run.launch}: rows of packed 4-bit weights cannot be split or "
            "flattened; use --base_precision bf16 there, or LAUNCH=single or ddp, where every GPU has the 4-bit base"
        )
    if cfg.tuning.stream_blocks:
        raise ValueError(
            f"base_precision nf4 stays on the GPU, got stream_blocks {cfg.tuning.stream_blocks} too; use "
            "--stream_blocks 0, or --base_precision bf16, whose blocks can stream"
        )


def lora_layers(model: nn.Module, lora: Lora) -> tuple[list[str], str]:
    """The linear layers that get adapters, and what is to be said of parts that name none. ValueError when nothing is
    left."""
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    wanted, unwanted = lora.lora_layers, lora.lora_skip_layers
    found = [name for name in layers if any(w in name for w in wanted) and not any(u in name for u in unwanted)]
    nothing = [part for part in wanted if not any(part in name for name in layers)]
    in_blocks = sorted({name.split(".", 2)[2] for name in layers if "_blocks." in name})
    if not found:
        raise ValueError(
            f"lora_layers {' '.join(wanted)} without lora_skip_layers {' '.join(unwanted) or '(none)'} leaves no "
            f"linear layer; expected parts of names, of the blocks {', '.join(in_blocks)}"
        )
    said = f"; lora_layers: no linear layer is called {', '.join(nothing)}, there are {', '.join(in_blocks)}"
    return found, said if nothing else ""


def add_lora(model: nn.Module, lora: Lora) -> str:
    """Adapters on the layers that the settings name, without memory for their weights; the rest is frozen. Says what
    trains."""
    model.requires_grad_(False)
    names, said = lora_layers(model, lora)
    with init_empty_weights():
        model.add_adapter(
            LoraConfig(
                r=lora.lora_rank,
                lora_alpha=lora.lora_alpha,
                lora_dropout=lora.lora_dropout,
                use_rslora=lora.use_rslora,
                target_modules=names,
            )
        )
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        layer.cast_input_dtype_enabled = False  # autocast casts the small weights instead of the activations
    assert len(layers) == len(names), f"{len(layers)} adapted layers, {len(names)} expected"
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    base = f", base in {lora.base_precision}" if lora.base_precision != "bf16" else ""
    return f"trains LoRA of rank {lora.lora_rank} on {len(layers)} layers: {trained / 1e6:.6g}M parameters{base}{said}"


def without_lora(name: str) -> str:
    """The checkpoint's name of a parameter of a model with adapters."""
    return name.replace(".base_layer.", ".")


def load(run: Run, cfg: Adapted, model: Model, weights: Path) -> Model:
    """loading.load_model for a model of which some parts may be frozen, which are kept in what is computed in, and of
    which some may be adapters, which begin."""
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]  # before 4 bits are packed into bytes
    run.trained_share = sum(n for n, trains in counts if trains) / sum(n for n, _ in counts)
    read = reader(run, model, weights, cfg.run.seed)
    return loading.load_model(run, cfg, model, weights, read=read, frozen_dtype=run.compute_dtype)


def reader(run: Run, model: nn.Module, weights: Path, seed: int) -> Reader:
    """Reads the base's weights by their own names, and begins adapters, where there are any, as peft does: A uniform
    within 1 / sqrt(fan-in), B zero. Every process draws the same A."""
    names = {without_lora(name) for name in model.state_dict() if ".lora_" not in name}
    read = loading.weights_reader(run, weights, names, seed)

    def read_or_begin(name: str, shape: tuple[int, ...], rows: slice) -> torch.Tensor:
        if ".lora_A." in name:
            rng = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            return ((2 * torch.rand(shape, generator=rng) - 1) / math.sqrt(shape[1]))[rows]
        if ".lora_B." in name:
            return torch.zeros(shape)[rows]
        return read(without_lora(name), shape, rows)

    return read_or_begin
