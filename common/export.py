"""Turn any checkpoint into weights to use: `python -m common.export CHECKPOINT OUT`, or by this file's path.

CHECKPOINT is a run's checkpoint-N, of any launch file. OUT becomes a folder that the model's from_pretrained opens, of
LoRA one that a pipeline's load_lora_weights opens, or, with --layout comfyui, one with a single file for ComfyUI.
Needs no GPU and no process group; memory holds one file's tensors (--max_shard_size), for ComfyUI one layer.
"""

import argparse
import json
import os
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


import torch
from safetensors.torch import save_file

from common.model import single_file
from common.model.card import write_card
from common.model.export import lora_settings, write_lora, write_shards
from common.record import integrity
from common.record.folder import read_state
from common.record.saved_weights import SavedWeights, of_folder, open_weights
from common.start.folders import find_model
from common.start.plan import explained_errors


def parse_size(text: str) -> int:
    """ "80GB" -> 80000000000, "512MB", "10000000"; decimal units as diffusers and transformers use."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B?)", text.strip().upper())
    if not match:
        raise ValueError(f"max_shard_size {text!r} is no size; expected for example 5GB or 500MB")
    return int(float(match[1]) * {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}[match[2].rstrip("B")])


def export(
    checkpoint: Path,
    out: Path,
    weights: str = "average",
    layout: str = "diffusers",
    dtype: str = "bf16",
    max_shard_bytes: int = 5 * 10**9,
    safe_serialization: bool = True,
) -> None:
    """See the flags. ValueError for a checkpoint that is damaged or has nothing to export, and for an `out` that holds
    weights already."""
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
    kept = "averaged" if weights == "average" and (checkpoint / "ema_rank0.pt").is_file() else "trained"
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
    return single_file.read_table(ROOT / "recipes" / state.get("recipe", "unknown"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="checkpoint-N folder of a run")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument(
        "--weights",
        choices=["average", "last"],
        default="average",
        help="the averaged weights, where the run kept any (--ema_decay), or the trained ones",
    )
    parser.add_argument("--layout", choices=["diffusers", "comfyui"], default="diffusers", help="whose names")
    parser.add_argument(
        "--dtype", choices=["bf16", "float8"], default="bf16", help="float8: the blocks' matrices in e4m3 with a scale"
    )
    parser.add_argument("--max_shard_size", default="5GB", help="largest file, for example 80GB for one file")
    parser.add_argument(
        "--safe_serialization",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="safetensors; --no-safe_serialization writes one .bin file",
    )
    args = parser.parse_args()
    export(
        args.checkpoint,
        args.out,
        args.weights,
        args.layout,
        args.dtype,
        parse_size(args.max_shard_size),
        args.safe_serialization,
    )


if __name__ == "__main__":
    with explained_errors():
        main()
