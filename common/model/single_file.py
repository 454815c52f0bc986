"""One safetensors file with the names that ComfyUI reads, in bf16 or in float8 with a scale a layer.

Which names those are is the recipe's, in comfyui.json beside its train.py:
"names"           {ComfyUI's name: our names, whose rows it has one after the other}, with {} for a block's number;
                  empty where both call everything the same
"swapped_halves"  ComfyUI's names of layers whose two halves stand in the other order
"markers"         {setting of the model's config: name of an empty tensor that stands for it}
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {torch.bfloat16: "BF16", torch.float32: "F32", torch.float8_e4m3fn: "F8_E4M3"}
FLOAT8_LAYER = re.compile(r"blocks\.\d+\..*\.weight$")  # matrices of the blocks: almost all of a model


def read_table(recipe_dir: Path) -> dict[str, Any]:
    """ValueError where the recipe has none."""
    file = recipe_dir / "comfyui.json"
    if not file.is_file():
        raise ValueError(
            f"{file} is not there, so ComfyUI's names of this model are not known; use --layout diffusers"
        )
    return json.loads(file.read_text())


def comfyui_names(table: Mapping[str, Any], names: Iterable[str]) -> dict[str, list[str]]:
    """{ComfyUI's name: our names, whose rows it has one after the other}, in the order of ours. ValueError for one
    that the table does not know."""
    known = {ours: (theirs, listed) for theirs, listed in table["names"].items() for ours in listed}
    found: dict[str, list[str]] = {}
    for name in names:
        number = re.search(r"(?<=blocks\.)\d+", name)
        digits = number[0] if number else ""
        general = re.sub(r"(?<=blocks\.)\d+", "{}", name, count=1)
        if general not in known and known:
            raise ValueError(f"comfyui.json has no name for {name}; add {general!r} to it, or use --layout diffusers")
        theirs, listed = known.get(general, (general, [general]))
        found[theirs.replace("{}", digits)] = [ours.replace("{}", digits) for ours in listed]
    return found


def single_file_tensors(
    table: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any], float8: bool
) -> tuple[dict[str, list[str]], dict[str, tuple[torch.dtype, tuple[int, ...]]]]:
    """({ComfyUI's name: our names}, {name in the file: (dtype, shape)}), of which a float8 layer has two: itself and
    its scale."""
    sources, layout = comfyui_names(table, shapes), {}
    for theirs, ours in sources.items():
        shape = (sum(shapes[name][0] for name in ours), *shapes[ours[0]][1:]) if shapes[ours[0]] else ()
        if float8 and len(shape) == 2 and FLOAT8_LAYER.search(theirs):
            layout[theirs] = (torch.float8_e4m3fn, shape)
            layout[f"{theirs}_scale"] = (torch.float32, ())
        else:
            layout[theirs] = (torch.bfloat16, shape)
    for setting, marker in table.get("markers", {}).items():
        if config.get(setting):
            layout[marker] = (torch.float32, (0,))
    return sources, layout


def to_float8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(e4m3 of the same shape, float32 scale ()): the weight is about e4m3 * scale, its largest value at e4m3's."""
    scale = (weight.float().abs().max() / torch.finfo(torch.float8_e4m3fn).max).clamp(min=1e-12)
    return (weight.float() / scale).to(torch.float8_e4m3fn), scale


def swap_halves(weight: Tensor) -> Tensor:
    first, second = weight.chunk(2)
    return torch.cat([second, first])


def convert(table: Mapping[str, Any], sources: dict[str, list[str]], read: Any, layout: dict) -> Iterator:
    """(name in the file, tensor), one layer at a time."""
    swapped = set(table.get("swapped_halves", []))
    for theirs, ours in sources.items():
        weight = torch.cat([read(name) for name in ours]) if len(ours) > 1 else read(ours[0])
        weight = swap_halves(weight) if theirs in swapped else weight
        if layout[theirs][0] == torch.float8_e4m3fn:
            weight, scale = to_float8(weight)
            yield f"{theirs}_scale", scale
        yield theirs, weight.to(layout[theirs][0])


def float8_metadata(layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> dict[str, str]:
    """What tells ComfyUI which layers are in float8, as its QUANTIZATION.md has it (Comfy-Org/ComfyUI)."""
    layers = [name.removesuffix(".weight") for name, (dtype, _) in layout.items() if dtype == torch.float8_e4m3fn]
    described = {"format_version": "1.0", "layers": {layer: {"format": "float8_e4m3fn"} for layer in layers}}
    return {"_quantization_metadata": json.dumps(described)} if layers else {}


def write_single_file(
    file: Path,
    layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    tensors: Iterable[tuple[str, Tensor]],
    metadata: dict[str, str],
) -> None:
    """A safetensors file, written tensor by tensor in any order, where the safetensors library wants all of them in
    memory at once. layout: {name: (dtype, shape)} of all of them."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name, (dtype, shape) in sorted(layout.items(), key=lambda item: -item[1][0].itemsize):  # each at its alignment
        begin, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        opened.truncate(8 + len(text) + end)
        for name, tensor in tensors:
            assert (tensor.dtype, tuple(tensor.shape)) == layout[name], name
            opened.seek(8 + len(text) + header[name]["data_offsets"][0])
            opened.write(tensor.contiguous().flatten().view(torch.uint8).numpy())


def comfyui_lora(table: Mapping[str, Any], weights: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """{diffusion_model.layer.lora_A.weight: ...} of {layer.lora_A.default.weight: ...}: the scale is multiplied into
    B, since files without alpha have a scale of 1; layers that ComfyUI has as one get one adapter of their ranks'
    sum."""
    layers = {name.split(".lora_")[0] for name in weights}
    found = {}
    for theirs, ours in comfyui_names(table, sorted(f"{layer}.weight" for layer in layers)).items():
        ours = [name.removesuffix(".weight") for name in ours]
        downs = {layer: weights[f"{layer}.lora_A.default.weight"] for layer in ours if layer in layers}
        ups = {layer: weights[f"{layer}.lora_B.default.weight"].float() * scale for layer in downs}
        rows = next(iter(ups.values())).shape[0]
        none = torch.zeros(rows, 0)  # of a layer without an adapter
        up = torch.block_diag(*(ups.get(layer, none) for layer in ours)).to(torch.bfloat16)
        key = f"diffusion_model.{theirs.removesuffix('.weight')}"
        found[f"{key}.lora_A.weight"] = torch.cat(list(downs.values())).to(torch.bfloat16).contiguous()
        found[f"{key}.lora_B.weight"] = swap_halves(up) if theirs in table.get("swapped_halves", []) else up
    return found
