"""Weights to bf16 safetensors in diffusers' layout, shard by shard. Every function is called on every process."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from common import rules
from common.model.card import write_card
from common.model.ema import Ema, evaluating
from common.model.sharding import full_tensor
from common.model.streaming import at_home
from common.processes import Run
from common.progress import stage
from common.settings import Shared

SHARD_BYTES = 5 * 10**9  # largest file written; also what a save needs of RAM


def full_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter, whole, one at a time (a collective call for sharded models)."""
    for name, parameter in model.named_parameters():
        yield name, full_tensor(parameter)


def full_shape(parameter: Tensor) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


@stage("export")
def export_trained(
    run: Run, cfg: Shared, model: nn.Module, ema: Ema | None, config: dict[str, Any], step: int = 0
) -> None:
    """export/transformer, which the model's from_pretrained reads, or export/lora, which a pipeline's
    load_lora_weights reads, where adapters train; with a step in export/step_<step>, without one where export_model
    asks for it. Averaged weights where they are kept."""
    if not (step or cfg.tuning.export_model):
        return
    module, settings = run.unwrap(model), rules.flat(cfg)
    has_lora = any(".lora_A." in name for name, _ in module.named_parameters())
    folder = Path(cfg.run.output_dir) / "export" / (f"step_{step:06d}" if step else "")
    folder = folder / ("lora" if has_lora else "transformer")
    partial = folder.with_name(folder.name + ".partial")
    if run.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    with evaluating(model, ema):
        if has_lora:
            tensors = {
                name: full_tensor(p).to("cpu", torch.bfloat16)
                for name, p in module.named_parameters()
                if ".lora_" in name
            }
            if run.is_main:
                write_lora(tensors, settings, partial)
        else:
            export_weights(run, module, partial, {"config.json": json.dumps(config, indent=2)})
    if run.is_main:
        write_card(partial, settings, step or cfg.batch.max_train_steps, run.recipe_dir.name)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(partial, folder)
    run.barrier()


def export_weights(
    run: Run, module: nn.Module, folder: Path, files: dict[str, str], max_shard_bytes: int = SHARD_BYTES
) -> None:
    """Write the weights as bf16 safetensors in diffusers' layout, shard by shard, so that memory holds one shard;
    `files` are added ({"config.json": ...})."""
    sizes = {name: 2 * torch.Size(full_shape(p)).numel() for name, p in module.named_parameters()}
    assert not set(module.state_dict()) - set(sizes), "a model with persistent buffers needs them exported too"
    weights = (
        (name, tensor.to("cpu", torch.bfloat16) if run.is_main else None) for name, tensor in full_weights(module)
    )
    with at_home(module):
        write_shards(weights, sizes, folder, max_shard_bytes, write=run.is_main)
    if run.is_main:
        for name, text in files.items():
            (folder / name).write_text(text)


def lora_settings(names: Iterable[str], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What diffusers and peft want to know beside the tensors {layer.lora_A.default.weight: ...}. settings: the run's,
    flat."""
    return {
        "peft_type": "LORA",
        "r": settings["lora_rank"],
        "lora_alpha": settings["lora_alpha"],
        "lora_dropout": 0.0,  # with the run's, a pipeline that loads the file would drop out when it draws
        "use_rslora": settings.get("use_rslora", False),
        "target_modules": sorted({name.split(".lora_")[0] for name in names}),
    }


def write_lora(weights: Mapping[str, Tensor], settings: Mapping[str, Any], folder: Path) -> None:
    """pytorch_lora_weights.safetensors with the adapters' settings in its metadata, as a pipeline's save_lora_weights
    writes it and its load_lora_weights reads it."""
    packed = {f"transformer.{key}": value for key, value in lora_settings(weights, settings).items()}
    save_file(
        {f"transformer.{name.replace('.default', '')}": tensor.contiguous() for name, tensor in weights.items()},
        folder / "pytorch_lora_weights.safetensors",
        metadata={"format": "pt", "lora_adapter_metadata": json.dumps(packed, indent=2, sort_keys=True)},
    )


def write_shards(
    weights: Iterator[tuple[str, Tensor | None]],
    sizes: dict[str, int],
    folder: Path,
    max_shard_bytes: int,
    write: bool = True,
) -> None:
    """Split tensors into files of at most max_shard_bytes (a larger tensor gets its own), with diffusers' names and
    index.

    sizes: {name: bytes} in the iterator's order, known beforehand because the file names hold the number of files.
    """
    groups: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if groups[-1] and used + size > max_shard_bytes:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += size
    weight_map: dict[str, str] = {}
    for number, names in enumerate(groups, start=1):
        single = len(groups) == 1
        file = (
            "diffusion_pytorch_model.safetensors"
            if single
            else f"diffusion_pytorch_model-{number:05d}-of-{len(groups):05d}.safetensors"
        )
        tensors = dict(next(weights) for _ in names)
        assert list(tensors) == names, "weights and sizes must come in the same order"
        if write:
            save_file(
                {name: tensor.contiguous() for name, tensor in tensors.items()},
                folder / file,
                metadata={"format": "pt"},
            )
        weight_map.update(dict.fromkeys(names, file))
    if write and len(groups) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(
            json.dumps(index, indent=1, sort_keys=True)
        )
