"""The weights of a checkpoint of any launch file, one tensor at a time: on a CPU, without a process group and without
the model."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from common.model.loading import safetensors_files, safetensors_reader
from common.record.folder import read_state

AVERAGED_NAMES = "averaged_parameters.json"  # of the tensors in ema_rank*.pt, in their order


@dataclass
class SavedWeights:
    """What a checkpoint holds: all of a model's weights, or, where parts are frozen, those that train."""

    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], Tensor]
    """a tensor by its name, whole, in the dtype that it was saved in"""


def open_weights(checkpoint: Path, average: bool) -> SavedWeights:
    """average: the averaged weights instead of the trained ones, where the run kept any.

    ValueError for what has no weights to read.
    """
    strategy = read_state(checkpoint)["strategy"]
    if strategy.startswith("zero"):
        saved = _of_deepspeed(checkpoint)
    elif strategy == "fsdp2":
        saved = SavedWeights(*tensors_of_dcp(checkpoint / "model"))
    else:
        saved = _of_safetensors(checkpoint / "model")
    return _averaged(checkpoint, saved, strategy) if average and has_average(checkpoint) else saved


def has_average(checkpoint: Path) -> bool:
    return (checkpoint / "ema_rank0.pt").is_file()


def of_folder(folder: Path) -> SavedWeights:
    """The weights of a model's folder in diffusers' layout."""
    return _of_safetensors(folder)


def _of_safetensors(folder: Path) -> SavedWeights:
    files = safetensors_files(folder)
    shapes = {}
    for file in set(files.values()):
        with safe_open(file, "pt") as opened:
            shapes |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}
    read = safetensors_reader(folder, set(files))
    return SavedWeights({name: shapes[name] for name in files}, lambda name: read(name, shapes[name], slice(None)))


def tensors_of_dcp(folder: Path) -> tuple[dict[str, tuple[int, ...]], Callable[[str], Tensor]]:
    """(shapes by name, reader) of what torch's distributed checkpoint saved."""
    import torch.distributed.checkpoint as dcp

    reader = dcp.FileSystemReader(folder)
    metadata = reader.read_metadata()
    reader.read_metadata = lambda *_, **__: metadata  # each load would read it again
    entries = {name: entry for name, entry in metadata.state_dict_metadata.items() if hasattr(entry, "size")}

    def read(name: str) -> Tensor:
        tensor = torch.empty(entries[name].size, dtype=entries[name].properties.dtype)
        dcp.load({name: tensor}, storage_reader=reader, no_dist=True)
        return tensor

    return {name: tuple(entry.size) for name, entry in entries.items()}, read


def _of_deepspeed(checkpoint: Path) -> SavedWeights:
    """The float32 masters that DeepSpeed keeps with the optimizer's state, memory-mapped."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    if list(checkpoint.glob("nvme_rank*.pt")):
        raise ValueError(
            f"{checkpoint} was written under zero3_nvme, whose fp32 weights lie on the NVMe disk; "
            "use the run's export/ folder, or resume it with --max_train_steps at the checkpoint's step, which exports"
        )
    weights = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), tag="deepspeed", lazy_mode=True)
    weights = {name.removeprefix("module."): tensor for name, tensor in weights.items()}
    return SavedWeights(
        {name: tuple(tensor.shape) for name, tensor in weights.items()},
        lambda name: torch.as_tensor(weights[name].contiguous()),
    )


def _averaged(checkpoint: Path, saved: SavedWeights, strategy: str) -> SavedWeights:
    """The average, put together from what each process kept of it; what was frozen has none."""
    if not (checkpoint / AVERAGED_NAMES).is_file():
        raise ValueError(
            f"{checkpoint} holds averaged weights without their names, as older versions saved them; take the trained "
            "ones with --weights last, or the run's export/, which has the average"
        )
    names = json.loads((checkpoint / AVERAGED_NAMES).read_text())
    number = {name: index for index, name in enumerate(names)}
    files = sorted(checkpoint.glob("ema_rank*.pt"), key=lambda file: int(file.stem.removeprefix("ema_rank")))
    ranks = [torch.load(file, map_location="cpu", mmap=True) for file in files]

    def read(name: str) -> Tensor:
        if name not in number:
            return saved.read(name)
        parts, shape = [rank[number[name]] for rank in ranks], saved.shapes[name]
        if strategy == "zero3":  # flat, and padded at the end
            return torch.cat([part.flatten() for part in parts])[: torch.Size(shape).numel()].view(shape)
        return torch.cat(parts) if strategy == "fsdp2" else parts[0]

    return SavedWeights(saved.shapes, read)
