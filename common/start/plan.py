"""What a run will need, said before anything is loaded; and what a user did wrong, in one sentence instead of a
traceback."""

import contextlib
import copy
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.data.loader import RANDOM_ROWS, collate
from common.processes import DiskFull, Run, stop
from common.settings import Shared
from common.start import lifeline, memory, needs, ways
from common.start.lifeline import DISK_FULL, MISTAKE, STOPPED
from common.start.needs import Layout, Size

Trial = Callable[[Shared, Run, nn.Module, dict], Iterable[Tensor]]


def check_size(
    run: Run, cfg: Shared, model: nn.Module, model_config: Any, random_sample: Callable, trial: Trial
) -> None:
    """Say what a run of a model without memory needs and whether it fits; with --plan that is all, and the program
    ends. ValueError on a GPU that it does not fit, unless ignore_plan.

    random_sample, trial: the recipe's; trial(cfg, run, model, batch) gives the losses of a batch of random samples.
    """
    layout = Layout(run.strategy, "nvme" if "nvme" in run.launch else "cpu" if run.offload else "none")
    here = needs.available()
    if not cfg.run.plan and (here is None or cfg.run.dry_run):
        return
    sample = random_sample(cfg, model_config, torch.Generator().manual_seed(RANDOM_ROWS))
    size_with = ways.once(partial(traced_size, on_meta(run), cfg, model, sample, trial))
    if cfg.run.plan:
        machine = needs.machine_of(cfg.run.gpus) or here
        ways.show(run, cfg, layout, machine, size_with, sample)
        sys.exit(0)
    assert here is not None
    here.gib = min(here.gib, cfg.run.memory_limit_gib or here.gib)
    here.gpus = run.world_size
    said = ways.verdict(cfg, layout, here, size_with(cfg.speed.gradient_checkpointing))
    check_disk(run, cfg, needs.checkpoint_gib(cfg, size_with(cfg.speed.gradient_checkpointing), layout))
    if said and not cfg.run.ignore_plan:
        table = ways.table(cfg, layout, here, size_with(cfg.speed.gradient_checkpointing))
        run.print("\n".join(table))
        way = ways.nearest(run, cfg, layout, here, size_with)
        way = f"what fits: {ways.describe(way)}" if way else "nothing that was tried fits; use a larger machine"
        raise ValueError(f"{said}; {way}; or go on with --ignore_plan")


def traced_size(run: Run, cfg: Shared, model: nn.Module, sample: dict, trial: Trial, checkpointing: bool) -> Size:
    """A model's size and what a micro-batch takes of memory, with or without checkpointing."""
    cfg = copy.deepcopy(cfg)
    cfg.speed.gradient_checkpointing = checkpointing
    batch_size = cfg.batch.train_batch_size
    places = [{"step": 0, "position": index, "group_size": batch_size} for index in range(batch_size)]
    batch = collate([sample | place for place in places])

    def losses_of(model: nn.Module) -> Iterable[Tensor]:
        if checkpointing and hasattr(model, "enable_gradient_checkpointing"):
            model.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False))
        return trial(cfg, run, model, batch)

    traced = memory.trace(model, losses_of, run.compute_dtype, cfg.speed.compile)
    return needs.size_of(model, traced, batch_size, run.compute_dtype.itemsize)


def on_meta(run: Run) -> Run:
    """The run as one process on the meta device, where tensors have sizes only, which says nothing."""
    quiet = {"device": torch.device("meta"), "process_index": 0, "num_processes": 1, "is_main_process": False}
    return replace(run, accelerator=SimpleNamespace(**quiet))


MEMORY_LADDER = (
    "In this order, try: --gradient_checkpointing; --train_batch_size 1 with accumulation; "
    "--optimizer flash_adamw with LAUNCH=fsdp2 (7 bytes a parameter, shared by the GPUs); "
    "LoRA in place of all weights: --lora_rank 32 --base_precision nf4 (0.55 bytes a parameter); "
    "--gradient_release (no accumulation, no clipping); one GPU: --optimizer adafactor --gradient_release (2 bytes), "
    "and --stream_blocks -1 with it (weights in main memory); "
    "LAUNCH=zero3_offload (GPU holds activations only, 16 bytes a parameter of RAM); "
    "LAUNCH=zero3_nvme; and --ema_decay 0"
)


@contextlib.contextmanager
def explained_errors(memory_advice: str = MEMORY_LADDER) -> Iterator[None]:
    """Show a user's mistake (a ValueError raised by this repository) as one sentence, and a full GPU with what to try
    next. Exit codes: 2 for a mistake, 74 for a full disk, 75 for a run that was stopped as asked and can go on."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        lifeline.fail(1, f"{str(error).splitlines()[0]} {memory_advice}")
    except ValueError as error:
        repository = str(Path(__file__).resolve().parents[2])
        raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
        if not raised_in.startswith(repository) or "site-packages" in raised_in:
            raise
        lifeline.fail(DISK_FULL if isinstance(error, DiskFull) else MISTAKE, str(error))
    code = STOPPED if stop.agreed and not stop.reason else 0
    lifeline.tell_run_sh(code, rank=0)
    lifeline.leave()
    sys.stdout.flush()
    sys.stderr.flush()
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":  # its threads can abort a finished process as it ends
        os._exit(0)
    if code and "RANK" not in os.environ:  # a launcher would take it for a failure; run.sh knows
        sys.exit(code)


def check_disk(run: Run, cfg: Shared, size: float) -> None:
    """Say at the start, not at the first save, that the disk of output_dir will not hold what is saved. size: of a
    checkpoint in GiB."""
    if not (run.is_main and cfg.run.checkpointing_steps):
        return
    copies = (cfg.run.checkpoints_total_limit or 1) + 1  # a new one is complete before the oldest goes
    need, free = copies * size, shutil.disk_usage(cfg.run.output_dir).free / 2**30
    if need > free:
        run.print(
            f"warning: {copies} checkpoints of {size:.0f} GiB need {need:.0f} GiB, and {cfg.run.output_dir} has "
            f"{free:.0f} free; take another --output_dir, a smaller --checkpoints_total_limit or a larger "
            "--checkpointing_steps"
        )
