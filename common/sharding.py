"""FSDP2 by torch's own fully_shard, and weights that reach every strategy without a second copy of the model.

accelerate's FSDP plugin does nothing on a CPU, so two processes would silently train two models there. fully_shard is
the same on CPU (gloo) and GPU (nccl): what the tests run is what a GPU runs. Models are built on the meta device
(`accelerate.init_empty_weights`), then `load_weights` fills each rank's part from safetensors, reading only the bytes
that the rank keeps.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

Reader = Callable[[str, tuple[int, ...], slice], Tensor]  # (name, full shape, rows wanted) -> those rows


def safetensors_files(folder: str | Path) -> dict[str, Path]:
    """{tensor name: file} of a diffusers or transformers weight folder, single-file or sharded.

    ValueError when there are none.
    """
    folder = Path(folder)
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if indexes:
        return {name: folder / file for name, file in json.loads(indexes[0].read_text())["weight_map"].items()}
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(
            f"no *.safetensors weights in {folder}; expected a model folder as diffusers' save_pretrained writes it"
        )
    names = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            names.update(dict.fromkeys(opened.keys(), file))
    return names


def safetensors_reader(folder: str | Path, expected: set[str]) -> Reader:
    """A reader of a weight folder's tensors, memory-mapped. ValueError when the names differ from the model's."""
    files = safetensors_files(folder)
    missing, unknown = sorted(expected - set(files)), sorted(set(files) - expected)
    if missing or unknown:
        raise ValueError(
            f"weights in {folder} do not fit the model: {len(missing)} missing (first {missing[:3]}), "
            f"{len(unknown)} unknown (first {unknown[:3]})"
        )
    opened = {}

    def read(name: str, shape: tuple[int, ...], rows: slice) -> Tensor:
        file = files[name]
        if file not in opened:
            opened[file] = safe_open(file, "pt")
        view = opened[file].get_slice(name)
        if tuple(view.get_shape()) != tuple(shape):
            raise ValueError(
                f"{name} in {file.name} has shape {tuple(view.get_shape())}, the model expects {tuple(shape)}"
            )
        return view[rows] if shape else opened[file].get_tensor(name)

    return read


def random_reader(seed: int, device: torch.device, scale: float = 0.02) -> Reader:
    """A reader that makes weights up, for benchmarks: normal with the given scale, biases zero, 1D weights one."""
    rng = torch.Generator(device).manual_seed(seed)

    def read(name: str, shape: tuple[int, ...], rows: slice) -> Tensor:
        shape = (len(range(*rows.indices(shape[0]))), *shape[1:]) if shape else ()
        if name.endswith("bias"):
            return torch.zeros(shape, device=device)
        if len(shape) < 2:
            return torch.ones(shape, device=device)
        return torch.randn(shape, generator=rng, device=device, dtype=torch.bfloat16) * scale

    return read


def load_weights(
    model: nn.Module,
    read: Reader,
    dtype: torch.dtype,
    device: torch.device,
    frozen_dtype: torch.dtype | None = None,
) -> None:
    """Fill the meta parameters of `model` on `device` in `dtype`, those that do not train in `frozen_dtype` if given;
    sharded (DTensor) ones get this rank's rows only."""
    trained_dtype = dtype
    for name, parameter, module, leaf in _parameters_with_owner(model):
        dtype = trained_dtype if parameter.requires_grad else frozen_dtype or trained_dtype
        if hasattr(parameter, "to_local"):
            full = torch.empty_like(parameter, dtype=dtype, device=device)
            local, start = full.to_local(), _first_row(parameter)
            local.copy_(read(name, tuple(parameter.shape), slice(start, start + local.shape[0])))
        else:
            full = read(name, tuple(parameter.shape), slice(None)).to(device, dtype)
        setattr(module, leaf, nn.Parameter(full, requires_grad=parameter.requires_grad))


def load_weights_zero3(
    model: nn.Module, read: Reader, dtype: torch.dtype, device: torch.device, ds_config: dict
) -> None:
    """Fill and partition meta parameters module by module: no rank ever holds the whole model (DeepSpeed ZeRO-3)."""
    import deepspeed

    children = [child for part in model.children() for child in (part if isinstance(part, nn.ModuleList) else [part])]
    names = {module: name for name, module in model.named_modules()}
    partitioned: nn.Parameter | None = None
    for module in [*children, model]:
        if not any(p.is_meta for p in module.parameters()):
            continue
        load_weights(module, _with_prefix(read, names[module]), dtype, device)
        whole = [p for p in module.parameters() if not hasattr(p, "ds_tensor")]
        if partitioned is None:  # Init allocates swap buffers: once, then its converter is used as DeepSpeed uses it
            deepspeed.zero.Init(module=module, config_dict_or_path=ds_config, dtype=dtype)
            partitioned = whole[0]
        else:
            partitioned.convert_to_zero_parameters(param_list=whole)


def _with_prefix(read: Reader, prefix: str) -> Reader:
    return (lambda name, shape, rows: read(f"{prefix}.{name}", shape, rows)) if prefix else read


def _parameters_with_owner(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Module, str]]:
    for module_name, module in model.named_modules():
        for leaf, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.device.type == "meta":
                yield f"{module_name}.{leaf}" if module_name else leaf, parameter, module, leaf


def _first_row(parameter: Tensor) -> int:
    """Where this rank's rows begin: fully_shard splits axis 0 as torch.chunk does."""
    mesh = parameter.device_mesh
    rows_per_rank = -(-parameter.shape[0] // mesh.size())
    return min(mesh.get_local_rank() * rows_per_rank, parameter.shape[0])


def shard_model(
    model: nn.Module,
    block_class: str,
    device: torch.device,
    compute_dtype: torch.dtype | None,
    offload: bool,
    reshard: bool,
) -> nn.Module:
    """fully_shard every module whose class is named `block_class`, then the root.

    compute_dtype: bf16 for fp32 weights with bf16 compute and fp32 gradient reduction, None when the weights' own
    dtype is used throughout (bf16 weights give bf16 gradients): either way weight and gradient agree, no bf16/float32
    mismatch can occur.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    outer = inner = MixedPrecisionPolicy()
    if compute_dtype:  # the root casts what comes in; blocks take it as it is, with rotary embeddings in float32
        outer = MixedPrecisionPolicy(compute_dtype, reduce_dtype=torch.float32, output_dtype=torch.float32)
        inner = replace(outer, output_dtype=None, cast_forward_inputs=False)
    settings = {
        "mesh": mesh,
        "reshard_after_forward": reshard,
        "offload_policy": CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy(),
    }
    blocks = []
    for name in block_class.split(","):
        found = [module for module in model.modules() if type(module).__name__ == name.strip()]
        if not found:
            raise ValueError(
                f"no module of class {name.strip()!r} to shard; "
                "the launch file's fsdp_transformer_layer_cls_to_wrap must name blocks of this model"
            )
        blocks += found
    for block in blocks:
        fully_shard(block, mp_policy=inner, **settings)
    return fully_shard(model, mp_policy=outer, **settings)


def local_tensor(parameter: nn.Parameter) -> Tensor:
    """This rank's part of a parameter: FSDP2's local shard, ZeRO-3's partition, or the parameter itself."""
    if hasattr(parameter, "to_local"):
        return parameter.to_local()
    return parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter.data


def full_tensor(parameter: Tensor) -> Tensor:
    """The whole parameter on every rank (a collective call when it is sharded)."""
    if hasattr(parameter, "full_tensor"):
        return parameter.detach().full_tensor()
    if hasattr(parameter, "ds_tensor"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    return parameter.detach()


class Ema:
    """Exponential moving average of the weights in float32, kept shard by shard beside the weights (4 bytes a
    parameter over all ranks)."""

    def __init__(self, model: nn.Module, decay: float):
        self.model, self.decay = model, decay
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.shadow = [local_tensor(p).detach().float().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Call once after each optimizer step; the decay warms up as (1 + step) / (10 + step)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for shadow, parameter in zip(self.shadow, self.parameters):
            shadow.lerp_(local_tensor(parameter).detach().float(), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the block the model holds the averaged weights; afterwards the trained ones are back, bit for bit."""
        trained = [local_tensor(p).detach().clone() for p in self.parameters]
        self._copy_in(self.shadow)
        try:
            yield
        finally:
            self._copy_in(trained)

    @torch.no_grad()
    def _copy_in(self, tensors: list[Tensor]) -> None:
        for parameter, tensor in zip(self.parameters, tensors):
            local_tensor(parameter).copy_(tensor)
        persistent = [parameter for parameter in self.parameters if getattr(parameter, "ds_persist", False)]
        if persistent:  # small ones that ZeRO-3 keeps whole beside their partitions
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)
        for module in self.model.modules():
            if hasattr(module, "reshard"):  # FSDP2, where a forward may leave weights gathered: they are old now
                module.reshard()
