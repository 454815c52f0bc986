"""Processes and strategy, from what `accelerate launch` put into the environment; signals."""

import os
import signal
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs

from common.model.streaming import bind, repeated_blocks
from common.processes import Run, device_name, on_main, stop
from common.progress import stages
from common.record.folder import check_optimizer_of, claim_output_dir, find_checkpoint
from common.settings import Shared
from common.start import dry_run, lifeline, needs
from common.start.folders import resolve_paths
from common.step.optimizers import GradientRelease, check_optimizer

COMPUTE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}


def set_up(
    cfg: Shared,
    recipe_dir: Path,
    argv: Sequence[str] | None = None,
    backwards: int = 1,
    find_unused_parameters: bool = True,
) -> Run:
    """Start the processes' group and the accelerator, name the output folder and the checkpoint to go on from.

    FSDP2 is read from the launch file's variables but done by common/model/sharding.py (accelerate's plugin is
    inactive on a CPU). Everything that DeepSpeed takes from its own JSON and would silently prefer is written from the
    config: accumulation, clipping, micro batch. Raises ValueError where the optimizer cannot run under the strategy or
    the global batch size cannot be divided.

    backwards: of a micro-batch, each a micro-step of the loop. find_unused_parameters: False where every parameter
    that trains gets a gradient in every backward, and DDP need not search.
    """
    if cfg.run.plan:
        return planned(cfg, recipe_dir, argv, backwards)
    stages.begin()
    resolve_paths(cfg, recipe_dir, argv)
    dealt_to = dry_run.set_apart(cfg) if cfg.run.dry_run else 0
    if cfg.run.memory_limit_gib and torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory / 2**30
        torch.cuda.set_per_process_memory_fraction(min(1.0, cfg.run.memory_limit_gib / total))
    fsdp, uses_deepspeed = _read_launch_file(recipe_dir)
    world_size = _start_process_group(bool(fsdp) or uses_deepspeed)
    _handle_signals()  # until here there is nothing to save
    _share_global_batch(cfg, dealt_to or world_size)
    micro_steps = cfg.batch.gradient_accumulation_steps * backwards
    dtype = weights_dtype(cfg, uses_deepspeed)
    accelerator = _make_accelerator(cfg, uses_deepspeed, dtype, micro_steps, find_unused_parameters)
    assert accelerator.num_processes == world_size, (
        f"launched as {world_size} processes, the accelerator sees {accelerator.num_processes}"
    )
    strategy, offload = "ddp" if world_size > 1 else "single", "none"
    if fsdp:
        strategy, offload = "fsdp2", "cpu" if fsdp.get("FSDP_OFFLOAD_PARAMS", "false") == "true" else "none"
    elif uses_deepspeed:
        strategy, offload = _fill_deepspeed_config(accelerator, cfg, world_size, micro_steps)
    cfg.run.launch = strategy + {"none": "", "cpu": "_offload", "nvme": "_nvme"}[offload]
    _refuse(cfg, strategy, offload, world_size)
    cfg.batch.gradient_accumulation_steps *= dealt_to or 1  # one process: its first micro-batch is still rank 0's
    run = Run(
        accelerator=accelerator,
        strategy=strategy,
        launch=cfg.run.launch,
        offload=offload != "none",
        recipe_dir=recipe_dir,
        accumulation=micro_steps,
        compute_dtype=COMPUTE_DTYPES[cfg.precision.mixed_precision],
        weights_dtype=dtype,
        fsdp=fsdp,
        benchmark=cfg.run.benchmark,
        validates=cfg.validation.validation_steps > 0 and not (cfg.run.benchmark or cfg.run.dry_run),
        resume=None,
    )
    run.resume = on_main(run, find_checkpoint, cfg.run.output_dir, cfg.run.resume_from_checkpoint)
    check_optimizer_of(run.resume, cfg)
    asked = cfg.run.resume_from_checkpoint
    on_main(run, claim_output_dir, cfg.run.output_dir, run.resume, cfg.run.overwrite_output_dir, False, asked)
    run.print(
        f"{recipe_dir.name}: {run.launch} on {run.world_size} x {device_name()}, results in {cfg.run.output_dir}"
    )
    return run


def planned(cfg: Shared, recipe_dir: Path, argv: Sequence[str] | None, backwards: int) -> Run:
    """The run that LAUNCH, or else the config's launch file, would start, for a plan: without processes, folders left
    alone. Its processes are the GPUs asked about, or what WORLD_SIZE says."""
    resolve_paths(cfg, recipe_dir, argv)
    cfg.run.launch = os.environ.get("LAUNCH") or cfg.run.launch
    if not cfg.run.gpus and not torch.cuda.is_available():
        cfg.run.gpus = needs.promised(list(sys.argv[1:] if argv is None else argv))
    layout, machine = needs.read_layout(recipe_dir, cfg.run.launch), needs.machine_of(cfg.run.gpus)
    world_size = machine.gpus if machine else int(os.environ.get("WORLD_SIZE", 1))
    if layout.strategy == "single" and world_size > 1:
        layout, cfg.run.launch = needs.read_layout(recipe_dir, "ddp"), "ddp"
    if layout.strategy == "ddp" and world_size == 1:
        layout, cfg.run.launch = needs.read_layout(recipe_dir, "single"), "single"
    _share_global_batch(cfg, world_size)
    one = {"device": torch.device("cpu"), "process_index": 0, "num_processes": world_size, "is_main_process": True}
    return Run(
        accelerator=SimpleNamespace(**one),
        strategy=layout.strategy,
        launch=cfg.run.launch,
        offload=layout.offload != "none",
        recipe_dir=recipe_dir,
        accumulation=cfg.batch.gradient_accumulation_steps * backwards,
        compute_dtype=COMPUTE_DTYPES[cfg.precision.mixed_precision],
        weights_dtype=torch.float32,
        fsdp={},
        benchmark=False,
        validates=False,
        resume=None,
    )


def _read_launch_file(recipe_dir: Path) -> tuple[dict[str, str], bool]:
    """(FSDP_* variables of the launch file, whether DeepSpeed is asked for), and the environment made ready for
    either."""
    if "--launch" in sys.argv:
        raise ValueError("--launch comes too late, the processes are running: use LAUNCH=NAME run.sh ..., or the YAML")
    fsdp: dict[str, str] = {}
    if os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() == "true":
        fsdp = {"FSDP_VERSION": "2"} | {key: value for key, value in os.environ.items() if key.startswith("FSDP_")}
    uses_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    if uses_deepspeed:
        # a launch file's mixed_precision must not stop accelerate: the config decides
        os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)
        # compiled operators are kept for each environment: their build files name its headers, and fail without them
        cache = Path.home() / ".cache" / "torch_extensions" / f"{zlib.crc32(sys.prefix.encode()):08x}"
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(cache))
        # launch files name deepspeed/zero3.json relative to their recipe, whatever the working directory is
        path = Path(os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"])
        places = [recipe_dir / path, recipe_dir / "deepspeed" / path, Path.cwd() / path]
        found = next((place for place in places if place.is_file()), None)
        if found is None:
            there = ", ".join(sorted(place.name for place in (recipe_dir / "deepspeed").glob("*.json")))
            raise ValueError(f"no DeepSpeed file {path}; in the recipe's deepspeed/ there are: {there or 'none'}")
        os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(found)
    return fsdp, uses_deepspeed


def _start_process_group(is_asked_for: bool) -> int:
    """The number of processes; their group is started where there are several, or a strategy needs one of its own."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    needed = "RANK" in os.environ and (world_size > 1 or is_asked_for)
    if needed and not torch.distributed.is_initialized():
        lifeline.join()
    return world_size


def _share_global_batch(cfg: Shared, world_size: int) -> None:
    """gradient_accumulation_steps from global_batch_size, where that is given."""
    per_micro_step = cfg.batch.train_batch_size * world_size
    if cfg.batch.global_batch_size % per_micro_step:
        raise ValueError(
            f"global_batch_size {cfg.batch.global_batch_size} does not divide by train_batch_size "
            f"{cfg.batch.train_batch_size} x {world_size} processes; use a multiple of {per_micro_step}, another "
            "NPROC, or --gradient_accumulation_steps with --global_batch_size 0"
        )
    if cfg.batch.global_batch_size:
        cfg.batch.gradient_accumulation_steps = cfg.batch.global_batch_size // per_micro_step


def _make_accelerator(
    cfg: Shared, uses_deepspeed: bool, dtype: torch.dtype, micro_steps: int, find_unused_parameters: bool
) -> Accelerator:
    on_cuda = torch.cuda.is_available()
    # unused: a last block's text branch, for one, gets no gradient. cpu and backend: without them, accelerate sees
    # "no distribution" on a machine without GPU, and each process silently trains alone.
    handlers = [DistributedDataParallelKwargs(find_unused_parameters=find_unused_parameters)]
    if uses_deepspeed and not on_cuda:
        handlers.append(InitProcessGroupKwargs(backend="gloo"))
    return Accelerator(
        cpu=not on_cuda and not uses_deepspeed,
        mixed_precision=cfg.precision.mixed_precision if uses_deepspeed or dtype == torch.float32 else "no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=micro_steps, sync_with_dataloader=False),
        kwargs_handlers=handlers,
    )


def _fill_deepspeed_config(
    accelerator: Accelerator, cfg: Shared, world_size: int, micro_steps: int
) -> tuple[str, str]:
    """Write the settings into DeepSpeed's; returns (zero2 or zero3, where its optimizer state lies: none, cpu,
    nvme)."""
    # transformers partitions what it loads as long as this object lives, but frozen encoders must stay whole
    accelerator.state.deepspeed_plugin.dschf = None
    ds = accelerator.state.deepspeed_plugin.deepspeed_config
    ds["train_micro_batch_size_per_gpu"] = cfg.batch.train_batch_size
    ds["gradient_accumulation_steps"] = micro_steps
    ds["train_batch_size"] = cfg.batch.train_batch_size * micro_steps * world_size
    ds["gradient_clipping"] = cfg.optim.max_grad_norm
    ds["bf16"] = {**ds.get("bf16", {}), "enabled": cfg.precision.mixed_precision == "bf16"}
    for section in ("optimizer", "scheduler"):
        if ds.pop(section, None) is not None:
            accelerator.print(f"the DeepSpeed file's section {section} is skipped: the config decides")
    zero = ds["zero_optimization"]
    for section in ("offload_param", "offload_optimizer"):
        if zero.get(section, {}).get("device") == "nvme":
            folder = Path(cfg.tuning.nvme_path or Path(cfg.run.output_dir) / "nvme")
            folder.mkdir(parents=True, exist_ok=True)
            zero[section]["nvme_path"] = str(folder)
    return f"zero{zero['stage']}", zero.get("offload_optimizer", {}).get("device", "none")


def _refuse(cfg: Shared, strategy: str, offload: str, world_size: int) -> None:
    check_optimizer(cfg, strategy, offload != "none")
    if cfg.tuning.ema_decay and offload == "nvme":
        raise ValueError("ema_decay is not possible under zero3_nvme (weights lie on the disk); use --ema_decay 0")
    tuning = cfg.tuning
    if tuning.stream_blocks and (reason := _why_not_stream(cfg, strategy, world_size)):
        raise ValueError(f"stream_blocks is not possible: {reason}")
    if tuning.offload_activations and not (cfg.speed.gradient_checkpointing or tuning.stream_blocks):
        raise ValueError("offload_activations keeps the inputs of recomputed blocks; add --gradient_checkpointing")
    if strategy.startswith("zero") and cfg.precision.mixed_precision == "fp16":
        raise ValueError("mixed_precision fp16 is not set up for DeepSpeed here; use bf16 or no, or LAUNCH=ddp")


def _why_not_stream(cfg: Shared, strategy: str, world_size: int) -> str:
    if strategy not in ("single", "ddp"):
        return f"{strategy} shards the weights itself; use LAUNCH=single or ddp"
    if not (cfg.tuning.gradient_release or cfg.lora.lora_rank):
        return "a block's weights are updated inside its backward; add --gradient_release"
    if world_size > int(os.environ.get("LOCAL_WORLD_SIZE", world_size)):
        return "processes share the main memory of one machine, and these are on several; use LAUNCH=fsdp2_offload"
    if world_size > 1 and cfg.tuning.ema_decay:
        return "every process would keep all averaged weights in main memory; use --ema_decay 0"
    if world_size > 1 and cfg.tuning.optimizer == "flash_adamw":
        return "every process would keep flash_adamw's state in main memory; use --optimizer adafactor"
    return ""


def weights_dtype(cfg: Shared, uses_deepspeed: bool) -> torch.dtype:
    """bf16 where precision is kept elsewhere (DeepSpeed's masters, flash_adamw's extra bits, stochastic rounding),
    fp32 masters otherwise.

    flash_adamw on a CPU has no extra bits, so its weights are fp32 there.
    """
    if cfg.precision.mixed_precision != "bf16":  # under fp16 too: weights that train are fp32 masters there
        return torch.float32
    name = cfg.tuning.optimizer
    keeps_precision = name == "adafactor" or (name == "flash_adamw" and torch.cuda.is_available())
    return torch.bfloat16 if uses_deepspeed or keeps_precision else torch.float32


def prepare(
    run: Run, model: torch.nn.Module, optimizer: torch.optim.Optimizer, gradient_release: bool = False
) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """accelerator.prepare, except that an fsdp2 model is ready already and gradient release leaves the optimizer, and
    replicas' gradients, to its hooks."""
    if gradient_release:
        blocks = [list(block.parameters()) for block in repeated_blocks(model)]
        run.release = GradientRelease(optimizer, blocks, replicas=run.strategy == "ddp")
    bind(model, optimizer, run.release)
    if run.strategy == "fsdp2" or (run.strategy == "ddp" and gradient_release):
        return model, run.accelerator.prepare(optimizer)
    return run.accelerator.prepare(model, optimizer)


def _handle_signals() -> None:
    def ask_to_stop(signum: int, frame: object) -> None:
        if signum == signal.SIGINT and interrupted:
            raise KeyboardInterrupt  # the second Ctrl-C
        interrupted.extend([signum] * (signum == signal.SIGINT))
        stop.asked = True
        if not stop.is_training:
            lifeline.fail(lifeline.STOPPED, "stopped as asked, before the first step; what is encoded stays")

    interrupted: list[int] = []
    for name in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(name, ask_to_stop)
