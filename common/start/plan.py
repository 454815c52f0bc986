"""What a machine cannot hold, and what a user did wrong, said in one sentence before or instead of a traceback."""

import contextlib
import os
import shutil
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from common.model.streaming import N_SLOTS, blocks_to_stream, repeated_blocks
from common.processes import DiskFull, Run, stop
from common.settings import Shared
from common.step.optimizers import BYTES_PER_PARAMETER, BYTES_WITH_RELEASE

MISTAKE, DISK_FULL, STOPPED = 2, 74, 75  # exit codes; 74 and 75 are EX_IOERR and EX_TEMPFAIL of sysexits.h
# a parameter
NF4_BYTES = 0.55  # of 4 bits and their scales
CHECKPOINT_BYTES = {"adamw": 12, "adamw_8bit": 6, "paged_adamw_8bit": 6, "flash_adamw": 6, "adafactor": 2}


def check_size(run: Run, cfg: Shared, model: torch.nn.Module, activations_gib: float) -> None:
    """Say before data is encoded that a model does not fit the GPU, its streamed blocks main memory, its checkpoints
    the disk. activations_gib: what the recipe measured for one sample with checkpointing."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if run.device.type == "cuda":
        if cfg.tuning.stream_blocks:
            check_streaming(run, cfg, model, activations_gib)
        else:
            check_memory(run, cfg, model, activations_gib)
    check_disk(run, cfg, trained)


def check_streaming(run: Run, cfg: Shared, model: torch.nn.Module, activations_gib: float) -> None:
    """Say what streaming takes of the GPU and of main memory; ValueError where that is not there, with the number of
    blocks that would fit both."""
    gpu, main = gpu_gib(run, cfg), psutil.virtual_memory().available / 2**30
    blocks = len(repeated_blocks(model))
    wanted = blocks if cfg.tuning.stream_blocks < 0 else min(cfg.tuning.stream_blocks, blocks)
    needs = {n: streaming_gib(cfg, model, n) for n in range(1, blocks + 1)}
    on_gpu, in_main = needs[wanted][0] + activations_gib, needs[wanted][1]
    said = f"{wanted} of {blocks} blocks streamed: {in_main:.1f} GiB of main memory, {on_gpu:.1f} GiB on the GPU"
    if on_gpu <= gpu and in_main <= main:
        run.print(f"{said} for one sample (free: {main:.0f} and {gpu:.0f})")
        return
    fit = [n for n, (g, m) in needs.items() if g + activations_gib <= gpu and m <= main]
    nearest = min(fit, key=lambda n: abs(n - wanted), default=None)
    way = f"use --stream_blocks {nearest}" if nearest else "no number of blocks fits both; use a larger machine"
    raise ValueError(f"{said}, and there are {main:.0f} and {gpu:.0f}; {way}")


def streaming_gib(cfg: Shared, model: torch.nn.Module, wanted: int) -> tuple[float, float]:
    """(GiB on the GPU, GiB pinned in main memory) of weights, gradients and optimizer state with `wanted` blocks
    streamed."""
    groups = [sum(p.numel() for p in parameters) for _, parameters in blocks_to_stream(model, wanted)]
    trains = all(p.requires_grad for p in model.parameters())
    per_parameter = BYTES_WITH_RELEASE[cfg.tuning.optimizer] if trains else 2
    resident = sum(p.numel() for p in model.parameters()) - sum(groups)
    on_gpu = per_parameter * (resident + N_SLOTS * max(groups)) + 2 * max(groups)  # and one block's gradients
    averages = 4 if cfg.tuning.ema_decay else 0
    return on_gpu / 2**30, (per_parameter + averages) * sum(groups) / 2**30


def gpu_gib(run: Run, cfg: Shared) -> float:
    """What torch may take of this process's GPU."""
    total = torch.cuda.get_device_properties(run.device).total_memory / 2**30
    return min(total, cfg.run.memory_limit_gib or total)


def check_memory(run: Run, cfg: Shared, model: torch.nn.Module, activations_gib: float) -> None:
    """Refuse, before minutes of loading, what cannot fit on the card: weights, gradients and states by the optimizer's
    bytes a parameter, and the frozen weights beside them."""
    name = cfg.tuning.optimizer
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    per_parameter = BYTES_WITH_RELEASE[name] if cfg.tuning.gradient_release else BYTES_PER_PARAMETER[name]
    per_parameter += 6 if cfg.tuning.ema_decay else 0  # the average, and the trained weights while it is applied
    if run.offload:
        per_parameter = 2 if run.strategy == "zero2" else 0
    elif run.strategy == "zero2":
        per_parameter = 2 + (per_parameter - 2) / run.world_size
    shards = run.world_size if run.sharded else 1
    frozen = [p for p in model.parameters() if not p.requires_grad]
    frozen_bytes = sum(p.numel() * (NF4_BYTES if hasattr(p, "quant_state") else 2) for p in frozen)
    frozen_bytes = 0 if run.offload and run.sharded else frozen_bytes
    billions = sum(p.numel() for p in model.parameters()) / 1e9
    need = (per_parameter * parameters + frozen_bytes) / shards / 2**30 + activations_gib
    have = gpu_gib(run, cfg)
    if need > have:
        raise ValueError(
            f"{name} under {run.launch} on {run.world_size} GPU(s) needs about {need:.0f} GiB a GPU "
            f"for {billions:.2f}B parameters, this one has {have:.0f}. {MEMORY_LADDER}"
        )


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
        sys.exit(f"error: {str(error).splitlines()[0]} {memory_advice}")
    except ValueError as error:
        repository = str(Path(__file__).resolve().parents[2])
        raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
        if not raised_in.startswith(repository) or "site-packages" in raised_in:
            raise
        rank = int(os.environ.get("RANK", 0))
        if rank:  # when every process failed alike, the first one's message has ended the run within this time
            time.sleep(15)
        if not (rank and stop.asked):
            print(f"error: {error}" + (f" (process {rank})" if rank else ""), file=sys.stderr, flush=True)
        code = DISK_FULL if isinstance(error, DiskFull) else MISTAKE
        tell_run_sh(code)
        sys.exit(code)
    code = STOPPED if stop.agreed and not stop.reason else 0
    tell_run_sh(code)
    sys.stdout.flush()
    sys.stderr.flush()
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":  # its threads can abort a finished process as it ends
        os._exit(0)
    if code and "RANK" not in os.environ:  # a launcher would take it for a failure; run.sh knows
        sys.exit(code)


def tell_run_sh(code: int) -> None:
    """run.sh ends with this code, whatever a launcher makes of it."""
    file = os.environ.get("RUN_EXIT_CODE_FILE")
    if file and os.environ.get("RANK", "0") == "0":
        Path(file).write_text(str(code))


def check_disk(run: Run, cfg: Shared, parameters: int) -> None:
    """Say at the start, not at the first save, that the disk of output_dir will not hold what is saved."""
    if not (run.is_main and cfg.run.checkpointing_steps):
        return
    size = (CHECKPOINT_BYTES[cfg.tuning.optimizer] + (2 if run.strategy.startswith("zero") else 0)) * parameters
    copies = (cfg.run.checkpoints_total_limit or 1) + 1  # a new one is complete before the oldest goes
    need = (copies * size + (2 * parameters if cfg.tuning.export_model else 0)) / 1e9
    free = shutil.disk_usage(cfg.run.output_dir).free / 1e9
    if need > free:
        run.print(
            f"warning: {copies} checkpoints of {size / 1e9:.0f} GB and the export need about {need:.0f} GB, and "
            f"{cfg.run.output_dir} has {free:.0f} GB free; take another --output_dir, a smaller "
            "--checkpoints_total_limit or a larger --checkpointing_steps"
        )
