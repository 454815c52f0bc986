"""Weights that reach every strategy without a second copy of the model.

A model is built without memory (empty_model), sharded where the strategy shards, and each process's part is then
filled from safetensors, reading only the bytes that it keeps.
"""

import json
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.model.activations import Activations
from common.model.sharding import shard
from common.model.streaming import stream, streamers
from common.processes import Run
from common.progress import progress_bar, stage, stages
from common.settings import Shared

Model = TypeVar("Model", bound=nn.Module)
Reader = Callable[[str, tuple[int, ...], slice], Tensor]  # (name, full shape, rows wanted) -> those rows


def empty_model(model_class: type[Model], config: dict) -> Model:
    """A diffusers model of this config, without memory for its weights."""
    with init_empty_weights():
        return model_class.from_config(config)


@stage("load")
def load_model(
    run: Run,
    cfg: Shared,
    model: Model,
    weights: Path,
    read: Reader | None = None,
    frozen_dtype: torch.dtype | None = None,
) -> Model:
    """Fill an empty model shard by shard in the dtype that it trains in: checkpointed, compiled, sharded, streamed.

    read: where not simply the tensors of the weights folder; frozen_dtype: of parameters that do not train, where it
    is another.
    """
    read = counted(run, model, read or weights_reader(run, weights, set(model.state_dict()), cfg.run.seed))
    if cfg.speed.compile:
        torch._dynamo.config.recompile_limit = 64  # training and validation, sizes and masks: each is a variant
        model.compile_repeated_blocks()
    model = shard(run, model).train()
    if cfg.tuning.stream_blocks:
        streamer = stream(model, cfg.tuning.stream_blocks, run.device, run.weights_dtype, frozen_dtype)
        with streamer.at_home():
            fill(model, read, set(chain(*streamer.parameters)))
    checkpoint_blocks(run, cfg, model)
    if run.strategy == "zero3":
        ds_config = run.accelerator.state.deepspeed_plugin.deepspeed_config
        load_weights_zero3(model, read, run.weights_dtype, run.device, ds_config)
    else:
        load_weights(model, read, run.weights_dtype, weights_device(run), frozen_dtype)
    run.barrier()  # blocks in main memory are the same for all processes
    return model


def counted(run: Run, model: nn.Module, read: Reader) -> Reader:
    """The reader, with a progress bar: every parameter is read once."""
    total = len(list(model.parameters()))
    bar = progress_bar(desc="load", total=total, unit="tensors", disable=not run.is_main)

    def counting(*arguments: Any) -> Tensor:
        bar.update(1)
        if stages.current:
            stages.current["items"] += 1
        if bar.n == total:
            bar.close()
        return read(*arguments)

    return counting


def checkpoint_blocks(run: Run, cfg: Shared, model: nn.Module) -> None:
    """What a block's activations become: kept, recomputed, and the inputs of recomputed ones on the GPU or in main
    memory."""
    if not (cfg.speed.gradient_checkpointing or cfg.tuning.stream_blocks):
        return
    function = partial(checkpoint, use_reentrant=False) if cfg.speed.gradient_checkpointing else call_plainly
    if model in streamers:
        function = streamers[model].checkpointed(function)
    if cfg.tuning.offload_activations:
        function = Activations(run.device).offloading(function)
    model.enable_gradient_checkpointing(function)


def call_plainly(module: nn.Module, *args: Any) -> Any:
    return module(*args)


@torch.no_grad()
def fill(model: nn.Module, read: Reader, wanted: set[nn.Parameter]) -> None:
    """Copy weights into parameters that have memory already, one at a time."""
    for name, parameter in model.named_parameters():
        if parameter in wanted:
            parameter.copy_(read(name, tuple(parameter.shape), slice(None)))


def config_of(model: Model) -> dict:
    """A diffusers model's config.json."""
    return json.loads(model.to_json_string())


def weights_device(run: Run) -> torch.device:
    """Where this process's part of the weights lies between steps."""
    return torch.device("cpu") if run.offload else run.device


def weights_reader(run: Run, folder: Path, names: set[str], seed: int) -> Reader:
    """A reader of a weight folder's tensors, or of random ones for a benchmark, whose folder has no weights."""
    return random_reader(seed, weights_device(run)) if run.benchmark else safetensors_reader(folder, names)


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
        setattr(module, leaf, filled(parameter, full, module))


def filled(parameter: nn.Parameter, tensor: Tensor, module: nn.Module) -> nn.Parameter:
    """A parameter of these values for the place of an empty one in a module; in 4 bits where that one is of
    bitsandbytes' kind."""
    if not hasattr(parameter, "quant_state"):
        return nn.Parameter(tensor, requires_grad=parameter.requires_grad)
    settings = {name: getattr(parameter, name) for name in ("quant_type", "compress_statistics")}
    return type(parameter)(tensor, requires_grad=False, module=module, **settings).to(tensor.device)


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
