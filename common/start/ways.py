"""A plan in words: the table of what a run needs, whether a machine has it, and the nearest settings that fit."""

import copy
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor

from common.processes import Run
from common.settings import Shared
from common.start import needs
from common.start.needs import Layout, Machine, Size
from common.step.optimizers import BYTES_WITH_RELEASE, check_optimizer

GPUS = (1, 2, 4, 8)
SizeWith = Callable[[bool], Size]


def once(size: SizeWith) -> SizeWith:
    """Each size traced once: without checkpointing and with it."""
    known: dict[bool, Size] = {}

    def size_with(checkpointing: bool) -> Size:
        if checkpointing not in known:
            known[checkpointing] = size(checkpointing)
        return known[checkpointing]

    return size_with


# ---------------------------------------------------------------- what fits


def total(cfg: Shared, layout: Layout, machine: Machine, size: Size) -> tuple[float, float]:
    """(GiB of each GPU, GiB of main memory)."""
    on_gpu = sum(needs.gpu_gib(cfg, size, layout, machine.gpus).values())
    return on_gpu, needs.main_gib(cfg, size, layout, machine.gpus)["main memory"]


def fits(cfg: Shared, layout: Layout, machine: Machine, size: Size) -> bool:
    on_gpu, in_main = total(cfg, layout, machine, size)
    return on_gpu + needs.RESERVED_GIB <= machine.gib and in_main <= machine.main_gib


def verdict(cfg: Shared, layout: Layout, machine: Machine, size: Size) -> str:
    """What does not fit, or nothing."""
    on_gpu, in_main = total(cfg, layout, machine, size)
    said = f"{cfg.tuning.optimizer} under {layout.strategy} on {machine.gpus} GPU(s) needs about"
    if on_gpu + needs.RESERVED_GIB > machine.gib:
        return f"{said} {on_gpu:.0f} GiB a GPU, this one has {machine.gib:.0f}"
    if in_main > machine.main_gib:
        return f"{said} {in_main:.0f} GiB of main memory, {machine.main_gib:.0f} are free"
    return ""


def nearest(run: Run, cfg: Shared, layout: Layout, machine: Machine, size_with: SizeWith) -> list[str] | None:
    """The flags that change least and make the run fit; none, if it fits; None where nothing does."""
    ways = sorted(changes(run, cfg, layout, machine), key=lambda way: way[0])
    for _, flags, other, other_layout in ways:
        checkpointing = other.speed.gradient_checkpointing or bool(other.tuning.stream_blocks)
        if fits(other, other_layout, machine, size_with(checkpointing)):
            return flags
    return None


def changes(
    run: Run, cfg: Shared, layout: Layout, machine: Machine
) -> Iterator[tuple[float, list[str], Shared, Layout]]:
    """(how far it is from what was asked for, the flags, settings, layout) of every way that can be tried."""
    batches = [cfg.batch.train_batch_size >> times for times in range(cfg.batch.train_batch_size.bit_length())]
    for far, launch in enumerate(launches(run, layout, machine)):
        for step, (optimizer, release) in enumerate(updates(cfg)):
            for checkpointing in sorted({cfg.speed.gradient_checkpointing, True}):
                for stream in dict.fromkeys((cfg.tuning.stream_blocks, -1 if can_stream(cfg, release, launch) else 0)):
                    for halvings, batch in enumerate(batches):
                        other = copy.deepcopy(cfg)
                        other.batch.train_batch_size = batch
                        if optimizer != cfg.tuning.optimizer or release != cfg.tuning.gradient_release:
                            other.tuning.optimizer, other.tuning.gradient_release = optimizer, release
                        if stream != cfg.tuning.stream_blocks:
                            other.tuning.stream_blocks = stream
                        other.speed.gradient_checkpointing = checkpointing
                        accumulation = 1 if release else cfg.batch.gradient_accumulation_steps << halvings
                        other.batch.gradient_accumulation_steps = accumulation
                        if release:
                            other.optim.max_grad_norm = 0.0
                        other_layout = layout if launch == "" else needs.read_layout(run.recipe_dir, launch)
                        if not possible(other, other_layout):
                            continue
                        more = checkpointing != cfg.speed.gradient_checkpointing
                        streams = stream != cfg.tuning.stream_blocks
                        cost = 3.0 * far + 4.0 * step + 1.0 * more + 0.9 * halvings + 9.0 * streams
                        yield cost, flags_of(cfg, other, launch), other, other_layout


def launches(run: Run, layout: Layout, machine: Machine) -> list[str]:
    """Names of launch files, that which was asked for ("") first."""
    there = {file.stem for file in (run.recipe_dir / "accelerate").glob("*.yaml")}
    usual = ["single"] if machine.gpus == 1 else ["ddp", "fsdp2"]
    usual += ["zero2", "zero3", "zero3_offload"]
    own = [""] if (machine.gpus == 1) == (layout.strategy == "single") or layout.strategy.startswith("zero") else []
    return own + [name for name in usual if name in there and name != run.launch]


def updates(cfg: Shared) -> list[tuple[str, bool]]:
    """(optimizer, gradient release), those which were asked for first."""
    asked = (cfg.tuning.optimizer, cfg.tuning.gradient_release)
    if "gradient_release" not in vars(cfg.tuning):  # adapters on a frozen base
        return list(dict.fromkeys((asked, ("adamw_8bit", False))))
    more = [("flash_adamw", False), ("flash_adamw", True), ("adafactor", True), ("adamw", False)]
    return list(dict.fromkeys((asked, *more)))


def can_stream(cfg: Shared, release: bool, launch: str) -> bool:
    return "stream_blocks" in vars(cfg.tuning) and release and launch in ("", "single")


def possible(cfg: Shared, layout: Layout) -> bool:
    if cfg.tuning.stream_blocks and layout.strategy != "single":
        return False
    if cfg.tuning.gradient_release and cfg.tuning.optimizer not in BYTES_WITH_RELEASE:
        return False
    try:
        check_optimizer(cfg, layout.strategy, layout.offload != "none")
    except ValueError:
        return False
    return True


def flags_of(cfg: Shared, other: Shared, launch: str) -> list[str]:
    """What to add to the command."""
    flags = [f"LAUNCH={launch}"] if launch else []
    if other.tuning.optimizer != cfg.tuning.optimizer:
        flags.append(f"--optimizer {other.tuning.optimizer}")
    if other.tuning.gradient_release != cfg.tuning.gradient_release:
        flags.append("--gradient_release" if other.tuning.gradient_release else "--no_gradient_release")
    if (
        other.tuning.gradient_release != cfg.tuning.gradient_release
        and other.optim.max_grad_norm != cfg.optim.max_grad_norm
    ):
        flags.append(f"--max_grad_norm {other.optim.max_grad_norm:g}")
    if other.speed.gradient_checkpointing != cfg.speed.gradient_checkpointing:
        flags.append("--gradient_checkpointing")
    if other.tuning.stream_blocks != cfg.tuning.stream_blocks:
        flags.append(f"--stream_blocks {other.tuning.stream_blocks}")
    for name in ("train_batch_size", "gradient_accumulation_steps"):
        if getattr(other.batch, name) != getattr(cfg.batch, name):
            flags.append(f"--{name} {getattr(other.batch, name)}")
    return flags


def describe(flags: list[str] | None) -> str:
    if flags is None:
        return "nothing that was tried fits"
    return " ".join(flags) or "as it is"


# ---------------------------------------------------------------- in words


def table(cfg: Shared, layout: Layout, machine: Machine, size: Size) -> list[str]:
    """Lines: GiB of each GPU by part, their sum, main memory."""
    parts = needs.gpu_gib(cfg, size, layout, machine.gpus)
    lines = [f"  {name:<30}{gib:8.1f}" for name, gib in parts.items()]
    lines.append(f"  {'a GPU, at most':<30}{sum(parts.values()):8.1f}   of {machine.gib:.0f}")
    main = needs.main_gib(cfg, size, layout, machine.gpus)
    return ["GiB by count:", *lines, *(f"  {name:<30}{gib:8.1f}" for name, gib in main.items())]


def show(
    run: Run, cfg: Shared, layout: Layout, machine: Machine | None, size_with: SizeWith, sample: dict[str, Tensor]
) -> None:
    """The whole plan."""
    size = size_with(cfg.speed.gradient_checkpointing or bool(cfg.tuning.stream_blocks))
    asked = machine or Machine(run.world_size, float("inf"))
    numbers = f"{size.trained / 1e9:.3f}B parameters train, {size.frozen_bytes / 2**30:.1f} GiB are frozen"
    where = f"{asked.gpus} x {asked.card or 'GPU'} of {asked.gib:.0f} GiB" if machine else f"{asked.gpus} GPU(s)"
    print(f"plan of {run.recipe_dir.name} under {run.launch} on {where}: {numbers}; all is computed")
    print("\n".join(table(cfg, layout, asked, size)))
    print("\n".join(disk(cfg, layout, size, sample)))
    print(speed(cfg, layout, asked, size))
    if machine is None:
        print("this machine has no GPU and the config names none; --gpus 4x24 asks about one")
    else:
        said = verdict(cfg, layout, machine, size)
        way = nearest(run, cfg, layout, machine, size_with)
        print(f"does not fit: {said}; what fits: {describe(way)}" if said else "fits")
    print("nearest settings that fit, by count (main memory is not looked at):")
    print("\n".join(grid(run, cfg, layout, size_with)))


def disk(cfg: Shared, layout: Layout, size: Size, sample: dict[str, Tensor]) -> list[str]:
    """Lines: checkpoints, cache, what encoding leaves."""
    one = needs.checkpoint_gib(cfg, size, layout) if cfg.run.checkpointing_steps else 0.0
    copies = (cfg.run.checkpoints_total_limit or 1) + 1
    folder = next((p for p in (Path(cfg.run.output_dir), *Path(cfg.run.output_dir).parents) if p.is_dir()), Path("."))
    free = shutil.disk_usage(folder).free / 2**30
    lines = [f"disk: {copies} checkpoints of {one:.1f} GiB = {copies * one:.0f} GiB (free: {free:.0f})"]
    if hasattr(cfg, "pictures"):
        row = sum(tensor.nbytes for tensor in sample.values()) / 2**20
        said = f"{row:.1f} MiB a row of the cache, {row * 1000 / 1024:.1f} GiB for 1000 rows"
        lines.append(f"encoding: {said}; one pass of the frozen encoders over every new row before training")
    return lines


def speed(cfg: Shared, layout: Layout, machine: Machine, size: Size) -> str:
    seconds = needs.seconds_a_step(cfg, size, layout, machine)
    if seconds is None:
        return "time: no rate is known of this card or strategy"
    hours = seconds * cfg.batch.max_train_steps / 3600
    said = f"time: {seconds:.2f} s a step on {machine.card}, {cfg.batch.max_train_steps} steps in {hours:.1f} hours"
    return f"{said} (computed from {size.traced.flops / 1e12:.0f} TFLOP a micro-batch; not measured)"


def grid(run: Run, cfg: Shared, layout: Layout, size_with: SizeWith) -> list[str]:
    """A line for each number of GPUs and size of card; equal neighbours share one."""
    lines: list[tuple[str, list[str]]] = []
    for gpus in GPUS:
        for gigabytes, card in needs.CARDS_GB.items():
            machine = Machine(gpus, 0.985 * gigabytes, card)
            way = describe(nearest(run, cfg, layout, machine, size_with))
            if lines and lines[-1][0] == way and lines[-1][1][0].startswith(f"{gpus} x"):
                lines[-1][1].append(str(gigabytes))
            else:
                lines.append((way, [f"{gpus} x {gigabytes}"]))
    return [f"  {', '.join(names)} GB: {way}" for way, names in lines]
