"""The run around a recipe's loop: processes and strategy, learning rate, seeds, clipping, signals, errors."""

import datetime
import os
import signal
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs
from tqdm.auto import tqdm

from common.optimizers import GradientRelease, check_optimizer
from common.sharding import shard_model

Result = TypeVar("Result")
stop = {"asked": False, "agreed": False, "reason": ""}


@dataclass
class Run:
    """What set_up found: the accelerator, and how this run is spread over processes."""

    accelerator: Accelerator
    strategy: str
    """single, ddp, fsdp2, zero2 or zero3"""
    launch: str
    """name for messages: the strategy, with _offload or _nvme"""
    offload: bool
    recipe_dir: Path
    fsdp: dict[str, str] = field(default_factory=dict)
    release: GradientRelease | None = None

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def world_size(self) -> int:
        return self.accelerator.num_processes

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    @property
    def sharded(self) -> bool:
        return self.strategy in ("fsdp2", "zero3")

    def print(self, *words: object) -> None:
        """Print on the main process, beside a progress bar."""
        if self.is_main:
            tqdm.write(" ".join(map(str, words)), file=sys.stdout)
            sys.stdout.flush()

    def progress(self, items: Sequence, title: str) -> Iterator:
        """A progress bar on the main process."""
        return iter(progress_bar(items, title, disable=not self.is_main))

    def unwrap(self, model: torch.nn.Module) -> torch.nn.Module:
        """The bare model inside what the strategy wraps around it."""
        return model if self.strategy == "fsdp2" else self.accelerator.unwrap_model(model)

    def barrier(self) -> None:
        if self.world_size > 1:
            torch.distributed.barrier()


def progress_bar(*arguments: Any, **settings: Any) -> tqdm:
    """tqdm's, drawn every ten seconds where it goes to a log file, which bars would fill."""
    seconds = 0.1 if sys.stderr.isatty() else 10
    return tqdm(*arguments, **settings, dynamic_ncols=True, mininterval=seconds)


def set_up(cfg, recipe_dir: Path, backwards: int = 1, find_unused_parameters: bool = True) -> Run:
    """Start the processes' group and the accelerator, from what `accelerate launch` put into the environment.

    FSDP2 is read from the launch file's variables but done by common/sharding.py (accelerate's plugin is inactive on a
    CPU). Everything that DeepSpeed takes from its own JSON and would silently prefer is written from the config:
    accumulation, clipping, micro batch. Raises ValueError where the optimizer cannot run under the strategy or the
    global batch size cannot be divided.

    backwards: of a micro-batch, each a micro-step of the loop. find_unused_parameters: False where every parameter
    that trains gets a gradient in every backward, and DDP need not search.
    """
    _handle_signals()
    on_cuda = torch.cuda.is_available()
    uses_fsdp = os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() == "true"
    uses_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if uses_deepspeed:
        # a launch file's mixed_precision must not stop accelerate: the config decides
        os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)
        # compiled operators are kept for each environment: their build files name its headers, and fail without them
        cache = Path.home() / ".cache" / "torch_extensions" / f"{zlib.crc32(sys.prefix.encode()):08x}"
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(cache))
        _resolve_deepspeed_config(recipe_dir)
    if (
        "RANK" in os.environ
        and (world_size > 1 or uses_fsdp or uses_deepspeed)
        and not torch.distributed.is_initialized()
    ):
        if on_cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # hours, not 30 minutes: rank 0 may download a model or check a large data set while the others wait
        backend = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"
        torch.distributed.init_process_group(backend, timeout=datetime.timedelta(hours=12))
    if cfg.global_batch_size:
        per_micro_step = cfg.train_batch_size * world_size
        if cfg.global_batch_size % per_micro_step:
            raise ValueError(
                f"global_batch_size {cfg.global_batch_size} does not divide by train_batch_size "
                f"{cfg.train_batch_size} x {world_size} processes; use a multiple of {per_micro_step}, another NPROC, "
                "or --gradient_accumulation_steps with --global_batch_size 0"
            )
        cfg.gradient_accumulation_steps = cfg.global_batch_size // per_micro_step
    has_fp32_weights = weights_dtype(cfg, uses_deepspeed) == torch.float32
    # unused: a last block's text branch, for one, gets no gradient. cpu and backend: without them, accelerate sees
    # "no distribution" on a machine without GPU, and each process silently trains alone.
    handlers = [DistributedDataParallelKwargs(find_unused_parameters=find_unused_parameters)]
    micro_steps = cfg.gradient_accumulation_steps * backwards
    if uses_deepspeed and not on_cuda:
        handlers.append(InitProcessGroupKwargs(backend="gloo"))
    accelerator = Accelerator(
        cpu=not on_cuda and not uses_deepspeed,
        mixed_precision=cfg.mixed_precision if uses_deepspeed or has_fp32_weights else "no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=micro_steps, sync_with_dataloader=False),
        kwargs_handlers=handlers,
        log_with=_trackers(cfg.report_to),
        project_dir=cfg.output_dir,
    )
    assert accelerator.num_processes == world_size, (
        f"launched as {world_size} processes, the accelerator sees {accelerator.num_processes}"
    )
    strategy, offload = "ddp" if world_size > 1 else "single", False
    launch = strategy
    if uses_fsdp:
        strategy, offload = "fsdp2", os.environ.get("FSDP_OFFLOAD_PARAMS", "false") == "true"
        launch = "fsdp2_offload" if offload else "fsdp2"
    elif uses_deepspeed:
        # transformers partitions what it loads as long as this object lives, but frozen encoders must stay whole
        accelerator.state.deepspeed_plugin.dschf = None
        ds = accelerator.state.deepspeed_plugin.deepspeed_config
        strategy = f"zero{ds['zero_optimization']['stage']}"
        offload_device = ds["zero_optimization"].get("offload_optimizer", {}).get("device", "none")
        offload = offload_device != "none"
        launch = strategy + {"none": "", "cpu": "_offload", "nvme": "_nvme"}[offload_device]
        _fill_deepspeed_config(ds, cfg, world_size, micro_steps)
    check_optimizer(cfg, strategy, offload, world_size)
    if cfg.ema_decay and launch == "zero3_nvme":
        raise ValueError("ema_decay is not possible under zero3_nvme (weights lie on the disk); use --ema_decay 0")
    if "--launch" in sys.argv:
        raise ValueError("--launch comes too late, the processes are running: use LAUNCH=NAME run.sh ..., or the YAML")
    cfg.launch = launch
    fsdp = {key: value for key, value in os.environ.items() if key.startswith("FSDP_")} if uses_fsdp else {}
    return Run(accelerator, strategy, launch, offload, recipe_dir, fsdp)


def _resolve_deepspeed_config(recipe_dir: Path) -> None:
    """Launch files name deepspeed/zero3.json relative to their recipe, whatever the working directory is."""
    path = Path(os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"])
    if not path.is_absolute() and (recipe_dir / path).is_file():
        os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(recipe_dir / path)


def _fill_deepspeed_config(ds: dict, cfg, world_size: int, micro_steps: int) -> None:
    ds["train_micro_batch_size_per_gpu"] = cfg.train_batch_size
    ds["gradient_accumulation_steps"] = micro_steps
    ds["train_batch_size"] = cfg.train_batch_size * micro_steps * world_size
    ds["gradient_clipping"] = cfg.max_grad_norm
    ds["bf16"] = {**ds.get("bf16", {}), "enabled": cfg.mixed_precision == "bf16"}
    for section in ("offload_param", "offload_optimizer"):
        if ds["zero_optimization"].get(section, {}).get("device") == "nvme":
            ds["zero_optimization"][section]["nvme_path"] = cfg.nvme_path or str(Path(cfg.output_dir) / "nvme")
            Path(ds["zero_optimization"][section]["nvme_path"]).mkdir(parents=True, exist_ok=True)


def weights_dtype(cfg, uses_deepspeed: bool) -> torch.dtype:
    """bf16 where precision is kept elsewhere (DeepSpeed's masters, flash_adamw's extra bits, stochastic rounding),
    fp32 masters otherwise.

    flash_adamw on a CPU has no extra bits, so its weights are fp32 there.
    """
    if cfg.mixed_precision != "bf16":  # under fp16 too: weights that train are fp32 masters there
        return torch.float32
    keeps_precision = cfg.optimizer == "adafactor" or (cfg.optimizer == "flash_adamw" and torch.cuda.is_available())
    return torch.bfloat16 if uses_deepspeed or keeps_precision else torch.float32


def on_main(run: Run, function: Callable[..., Result], *arguments: Any) -> Result:
    """Call a function on the main process and give every process its result; its ValueError is raised on all of
    them."""
    outcome: list[Any] = [None, None]
    if run.is_main:
        try:
            outcome[0] = function(*arguments)
        except ValueError as error:
            outcome[1] = error
    if run.world_size > 1:
        torch.distributed.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise ValueError(str(outcome[1]))
    return outcome[0]


def shard(run: Run, model: torch.nn.Module, dtype: torch.dtype, cfg) -> torch.nn.Module:
    """Apply fully_shard when the strategy is fsdp2 (before weights are loaded); any other model is returned as it
    is."""
    if run.strategy != "fsdp2":
        return model
    compute_dtype = torch.bfloat16 if cfg.mixed_precision == "bf16" and dtype == torch.float32 else None
    reshard = run.fsdp.get("FSDP_RESHARD_AFTER_FORWARD", "true") == "true"
    block_class = run.fsdp.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "")
    return shard_model(model, block_class, run.device, compute_dtype, run.offload, reshard)


def prepare(
    run: Run, model: torch.nn.Module, optimizer: torch.optim.Optimizer, cfg
) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """accelerator.prepare, except that an fsdp2 model is ready already and gradient release leaves the optimizer to
    its hooks."""
    if cfg.gradient_release:
        run.release = GradientRelease(optimizer)
    if run.strategy == "fsdp2":
        return model, run.accelerator.prepare(optimizer)
    return run.accelerator.prepare(model, optimizer)


def _handle_signals() -> None:
    def ask_to_stop(signum: int, frame: object) -> None:
        if stop["asked"] and signum == signal.SIGINT:
            raise KeyboardInterrupt
        stop["asked"] = True

    for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(name, ask_to_stop)


def stop_requested() -> bool:
    """True once any process got SIGTERM, SIGUSR1 or Ctrl-C and all have agreed (in Meter.log), or all processes called
    request_stop: finish the step, save."""
    return stop["agreed"]


def request_stop(reason: str) -> None:
    """End the loop after this step, because training is done (early stopping). Called on every process, from
    validation: the meter, which comes before it in a step, decides about signals anew."""
    stop.update(agreed=True, reason=reason)


def _trackers(report_to: str) -> str | None:
    """The tracker's name for accelerate; wandb goes offline when nobody is logged in, and is left out where it is not
    installed."""
    if report_to == "none":
        return None
    import importlib.util

    if importlib.util.find_spec(report_to) is None:
        print(f"{report_to} is not installed: metrics go to metrics.jsonl and curves.png only")
        return None
    if report_to == "wandb":
        netrc = Path.home() / ".netrc"
        logged_in = "WANDB_API_KEY" in os.environ or (netrc.is_file() and "wandb" in netrc.read_text())
        os.environ.setdefault("WANDB_MODE", "online" if logged_in else "offline")
    return report_to
