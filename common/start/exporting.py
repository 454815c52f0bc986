"""Any checkpoint becomes weights to use: from_pretrained's folder, LoRA's file, or ComfyUI's."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from common.model import single_file
from common.model.card import write_card
from common.model.export import SHARD_BYTES, lora_settings, write_lora, write_shards
from common.record import integrity
from common.record.folder import read_state
from common.record.saved_weights import SavedWeights, has_average, of_folder, open_weights
from common.start.folders import find_model

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def export(
    checkpoint: Path,
    out: Path,
    weights: str = "average",
    layout: str = "diffusers",
    dtype: str = "bf16",
    max_shard_bytes: int = SHARD_BYTES,
    safe_serialization: bool = True,
) -> None:
    """checkpoint: of any launch file; the rest is as the flags of common/export.py say.

    ValueError for a checkpoint that is damaged or has nothing to export, and for an `out` that holds weights already.
    """
    if damage := integrity.damage(checkpoint, hashes=False):
        raise ValueError(f"{checkpoint} is no whole checkpoint: {damage}; give a checkpoint-N folder of a run")
    if dtype == "float8" and layout == "diffusers":
        raise ValueError(
            "dtype float8 is for --layout comfyui; for diffusers export bf16, and after loading say "
            "transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)"
        )
    if there := sorted(path.name for path in out.glob("*.safetensors")):
        raise ValueError(f"{out} holds {there[0]} already; give a new folder, or delete that one")
    state, config = read_state(checkpoint), _model_config(checkpoint)
    saved = open_weights(checkpoint, average=weights == "average")
    has_lora = any(".lora_A." in name for name in saved.shapes)
    partial = out / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if has_lora:
        _write_lora(saved, state, layout, partial)
    else:
        saved = _whole(saved, state, checkpoint)
        if layout == "comfyui":
            _write_comfyui(saved, state, config, dtype == "float8", partial / f"{out.resolve().name}.safetensors")
        else:
            _write_diffusers(saved, max_shard_bytes, safe_serialization, partial)
            (partial / "config.json").write_text(json.dumps(config, indent=2))
    write_card(partial, state["config"], state["step"], state.get("recipe", ""))
    for path in sorted(partial.iterdir()):
        os.replace(path, out / path.name)
    partial.rmdir()
    kept = "averaged" if weights == "average" and has_average(checkpoint) else "trained"
    print(f"{len(saved.shapes)} {kept} tensors of {checkpoint} written to {out}")


def _model_config(checkpoint: Path) -> dict[str, Any]:
    file = checkpoint / "config.json"
    if not file.is_file():
        raise ValueError(
            f"{checkpoint} has no config.json of a transformer, so it holds adapters of another kind; "
            "the run's best/, final/ or export/ folder has them as they are loaded"
        )
    return json.loads(file.read_text())


def _whole(saved: SavedWeights, state: Mapping[str, Any], checkpoint: Path) -> SavedWeights:
    """Where parts were frozen: what trained over the base's weights."""
    if not state.get("frozen"):
        return saved
    settings = state["config"]
    base = settings.get("transformer_path") or settings["pretrained_model_name_or_path"]
    folder = Path(base) if settings.get("transformer_path") else find_model(base, ("transformer",)) / "transformer"
    frozen = of_folder(folder)
    if unknown := sorted(saved.shapes.keys() - frozen.shapes.keys()):
        raise ValueError(
            f"{checkpoint} holds {unknown[0]}, which the base {folder} has not; this kind of adapter is loaded from "
            "the checkpoint itself, or from the run's export/"
        )
    return SavedWeights(frozen.shapes, lambda name: saved.read(name) if name in saved.shapes else frozen.read(name))


def _write_diffusers(saved: SavedWeights, max_shard_bytes: int, safe_serialization: bool, folder: Path) -> None:
    tensors = ((name, saved.read(name).to(torch.bfloat16)) for name in saved.shapes)
    if safe_serialization:
        sizes = {name: 2 * torch.Size(shape).numel() for name, shape in saved.shapes.items()}
        write_shards(tensors, sizes, folder, max_shard_bytes)
    else:
        torch.save(dict(tensors), folder / "diffusion_pytorch_model.bin")


def _write_comfyui(
    saved: SavedWeights, state: Mapping[str, Any], config: Mapping[str, Any], float8: bool, file: Path
) -> None:
    table = _table(state)
    sources, layout = single_file.single_file_tensors(table, saved.shapes, config, float8)
    tensors = single_file.convert(table, sources, saved.read, layout)
    single_file.write_single_file(file, layout, tensors, single_file.float8_metadata(layout))


def _write_lora(saved: SavedWeights, state: Mapping[str, Any], layout: str, folder: Path) -> None:
    weights = {name: saved.read(name).to(torch.bfloat16) for name in saved.shapes}
    if layout == "diffusers":
        write_lora(weights, state["config"], folder)
        return
    asked = lora_settings(weights, state["config"])
    scale = asked["lora_alpha"] / (asked["r"] ** 0.5 if asked["use_rslora"] else asked["r"])
    tensors = single_file.comfyui_lora(_table(state), weights, scale)
    save_file(tensors, folder / "pytorch_lora_weights.safetensors", metadata={"format": "pt"})


def _table(state: Mapping[str, Any]) -> dict[str, Any]:
    return single_file.read_table(RECIPES / state.get("recipe", "unknown"))
