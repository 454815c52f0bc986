"""A checkpoint of another launch file, or of another number of processes: read tensor by tensor, and put where this
run keeps it. Weights, AdamW's moments, averages. Every function is called on every process."""

from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn

from common.model.ema import Ema
from common.model.streaming import at_home
from common.processes import Run
from common.record import fsdp2
from common.record.folder import read_state
from common.record.saved_weights import has_average, open_weights, tensors_of_dcp

MOMENTS = ("exp_avg", "exp_avg_sq")


def is_needed(run: Run, folder: Path, ema: Ema | None) -> bool:
    """Whether this run's parts are not those that the checkpoint holds. ValueError where they cannot be made of
    them."""
    state = read_state(folder)
    before, now = _parts(state["strategy"], state["launch"]), _parts(run.strategy, run.launch)
    per_process = now.startswith("zero") or (
        now == "fsdp2" and (ema is not None or not (folder / "optimizer").is_dir())
    )
    if before == now and (state["world_size"] == run.world_size or not per_process):
        return False
    reason = ""
    if state["config"].get("optimizer", "adamw") != "adamw":
        reason = f"the parts of {state['config']['optimizer']}'s state belong to their launch file and processes"
    elif "zero3_nvme" in (before, now):
        reason = "the state of zero3_nvme lies on a disk of its own"
    elif "zero2" in (before, now):
        reason = "ZeRO-2 has no place for moments before its first step (zero3 and fsdp2 have)"
    elif ema is not None and not has_average(folder):
        reason = "it has no averaged weights (add --ema_decay 0)"
    if reason:
        raise ValueError(
            f"{folder} was saved by LAUNCH={state['launch']} NPROC={state['world_size']}, this run is {run.launch} "
            f"on {run.world_size}, and {reason}; resume as it was saved, or start a new run from its weights "
            "(`python -m common.export`) with --transformer_path"
        )
    return True


def _parts(strategy: str, launch: str) -> str:
    """How a strategy cuts up what it keeps."""
    if launch.endswith("_nvme"):
        return "zero3_nvme"
    return "replicated" if strategy in ("single", "ddp") else strategy


@torch.no_grad()
def load(run: Run, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ema: Ema | None) -> None:
    """Put the checkpoint's weights, moments and averages into this run's parts."""
    bare_model, bare_optimizer = run.unwrap(model), fsdp2.bare(optimizer)
    saved = open_weights(folder, average=False)
    trained = {name: p for name, p in bare_model.named_parameters() if p.requires_grad}
    if missing := trained.keys() - saved.shapes.keys():
        raise ValueError(f"{folder} does not hold {min(missing)}, which trains here; use the settings of its run")
    read_moment = _moments(folder, _names_in_order(run, trained, bare_optimizer))
    averages = open_weights(folder, average=True) if ema else None
    if run.strategy == "zero3":
        _make_room(model.optimizer, read_state(folder)["step"])
    with at_home(bare_model):
        for name, buffer in bare_model.named_buffers():
            if name in saved.shapes:
                buffer.copy_(saved.read(name))
        for name, parameter in trained.items():
            moments = {key: read_moment(name, key) for key in (*MOMENTS, "step")}
            if run.strategy == "zero3":
                _into_zero3(parameter, saved.read(name), moments)
            else:
                _into_torch(bare_optimizer, parameter, saved.read(name), moments)
        if ema:
            for shadow, name, parameter in zip(ema.shadow, ema.names, ema.parameters, strict=True):
                shadow.copy_(_own_part(run, averages.read(name), parameter))
    run.barrier()


def _names_in_order(run: Run, trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> list[str]:
    """Of the trained parameters, as the optimizer numbers them; none where DeepSpeed has flattened several groups."""
    if run.strategy.startswith("zero"):
        return list(trained) if len(optimizer.param_groups) == 1 else []  # flat
    name_of = {id(parameter): name for name, parameter in trained.items()}
    return [name_of[id(p)] for group in optimizer.param_groups for p in group["params"]]


def _moments(folder: Path, names: list[str]) -> Callable[[str, str], Tensor | None]:
    """(a parameter's name, a key of AdamW's state) -> the whole tensor, None for what never had a gradient."""
    strategy = read_state(folder)["strategy"]
    if strategy.startswith("zero"):
        return _of_deepspeed(folder)
    if strategy == "fsdp2":
        shapes, read = tensors_of_dcp(folder / "optimizer")
        return lambda name, key: read(f"state.{name}.{key}") if f"state.{name}.{key}" in shapes else None
    if not names:
        raise ValueError(
            f"{folder} was saved by LAUNCH={read_state(folder)['launch']}, whose groups of learning rates cannot go "
            "on under DeepSpeed; resume as it was saved"
        )
    state = torch.load(folder / "optimizer.pt", map_location="cpu", mmap=True)["state"]
    number = {name: index for index, name in enumerate(names)}
    return lambda name, key: state.get(number[name], {}).get(key)


def _of_deepspeed(folder: Path) -> Callable[[str, str], Tensor | None]:
    """By DeepSpeed's own reader of ZeRO-3's fp32 masters, with the moments in their place."""
    from deepspeed.utils import zero_to_fp32

    parse = zero_to_fp32.parse_optim_states
    tensors: dict[str, dict[str, Tensor]] = {}
    steps = []
    for key in MOMENTS:

        def moments(files: list[str], place: str, key: str = key) -> tuple:
            stage, world_size, _, paddings = parse(files, place)
            groups = []
            for file in files:
                saved = torch.load(file, map_location="cpu", mmap=True, weights_only=False)["optimizer_state_dict"]
                state = saved["optimizer_state_dict"]["state"]
                groups.append([state[number][key] for number in sorted(state)])
                steps.append(state[min(state)]["step"])
            return stage, world_size, groups, paddings

        with mock.patch.object(zero_to_fp32, "parse_optim_states", moments):
            found = zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(str(folder), tag="deepspeed", lazy_mode=True)
        tensors[key] = {name.removeprefix("module."): tensor for name, tensor in found.items()}

    def read(name: str, key: str) -> Tensor:
        return torch.as_tensor(float(steps[0]) if key == "step" else tensors[key][name].contiguous())

    return read


def _into_torch(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, weight: Tensor, moments: dict) -> None:
    _copy(parameter, weight)
    optimizer.state.pop(parameter, None)
    if moments[MOMENTS[0]] is None:
        return
    (group,) = (group for group in optimizer.param_groups if any(parameter is p for p in group["params"]))
    device = parameter.device if group.get("fused") or group.get("capturable") else "cpu"
    state = {"step": torch.tensor(float(moments["step"]), dtype=torch.float32, device=device)}
    for key in MOMENTS:
        state[key] = torch.zeros_like(parameter)
        _copy(state[key], moments[key])
    optimizer.state[parameter] = state


def _copy(target: Tensor, whole: Tensor) -> None:
    if hasattr(target, "to_local"):
        target.to_local().copy_(_shard(whole, target))
    else:
        target.copy_(whole)


def _shard(whole: Tensor, like: Tensor) -> Tensor:
    from torch.distributed.tensor import distribute_tensor

    mesh = like.device_mesh
    return distribute_tensor(whole.to(mesh.device_type), mesh, like.placements, src_data_rank=None).to_local()


def _into_zero3(parameter: nn.Parameter, weight: Tensor, moments: dict) -> None:
    import deepspeed
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    safe_set_local_fp32_param(parameter, _partition(weight, parameter))
    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        parameter.data.copy_(weight)
    for key in MOMENTS:
        if moments[key] is not None:
            safe_set_local_optimizer_state(parameter, _partition(moments[key], parameter), key)


def _make_room(optimizer: torch.optim.Optimizer, step: float) -> None:
    """AdamW's state of a new ZeRO-3 optimizer, which would be made in the first step."""
    for weights in optimizer.fp32_partitioned_groups_flat:
        is_torchs = isinstance(optimizer.optimizer, torch.optim.AdamW)
        state = {"step": torch.tensor(float(step)) if is_torchs else int(step)}
        optimizer.optimizer.state[weights] = state | {key: torch.zeros_like(weights) for key in MOMENTS}


def _partition(whole: Tensor, parameter: nn.Parameter) -> Tensor:
    """This process's part of a tensor, as ZeRO-3 cuts it: flat, padded at the end."""
    size = parameter.ds_tensor.numel()
    flat = whole.flatten()[torch.distributed.get_rank() * size :][:size].to(parameter.ds_tensor.device)
    return nn.functional.pad(flat, (0, size - flat.numel()))


def _own_part(run: Run, whole: Tensor, parameter: nn.Parameter) -> Tensor:
    """This process's part of an average, as model/ema.py keeps it."""
    if run.strategy == "zero3":
        return _partition(whole, parameter)
    return _shard(whole, parameter) if hasattr(parameter, "to_local") else whole
