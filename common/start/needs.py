"""What a run needs of a machine, by counting: GPU and main memory, disk, time. What is traced (memory.py) is scaled to
other batches; every second is computed, none is measured here."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import nn

from common.model.streaming import N_SLOTS, blocks_to_stream, repeated_blocks
from common.settings import Shared
from common.start.fused import Traced

GIB = 2**30
NF4_BYTES = 0.516  # a parameter: 4 bits, an 8-bit scale for 64 of them, and a scale for 256 scales
STATE_BYTES = {"adamw": 8, "adamw_8bit": 2, "paged_adamw_8bit": 2, "flash_adamw": 3, "adafactor": 0}
CHECKPOINT_BYTES = {"adamw": 12, "adamw_8bit": 6, "paged_adamw_8bit": 6, "flash_adamw": 6, "adafactor": 2}
KEEPS_PRECISION = ("flash_adamw", "adafactor")  # in bf16 weights
PROCESS_GIB = 3.0  # of main memory a process takes by itself
ZERO_BUCKETS = 2 * 2 * 200_000_000  # bytes: two of DeepSpeed's reduce_bucket_size in bf16
RESERVED_GIB = 1.0  # of a GPU: CUDA's own, and what the allocator cannot fill
# a card: FLOP/s of large products (H100 and H200 measured, others from data sheets), bytes/s of its memory
CARDS = {
    "H100": (780e12, 2.6e12),
    "H200": (780e12, 3.6e12),
    "A100": (270e12, 1.6e12),
    "L40S": (300e12, 0.7e12),
    "4090": (150e12, 0.8e12),
    "5090": (200e12, 1.4e12),
    "A6000": (130e12, 0.6e12),
    "V100": (100e12, 0.7e12),
}
CARDS_GB = {16: "", 24: "4090", 32: "5090", 48: "L40S", 80: "H100", 141: "H200"}  # what a card of a size may be
LINK = 50e9  # bytes/s from main memory, each way (measured on the H100's machine)
# fitted to what the READMEs have measured: shares of a card's rate that its products reach, the seconds that a kernel
# takes at least, those that a CPU needs to launch one (more where they are recomputed), and to update one tensor
COMPILED_SHARE, EAGER_SHARE = 0.72, 0.41
KERNEL, LAUNCH, LAUNCH_RECOMPUTED, UPDATE = 6.5e-6, 42e-6, 62e-6, 140e-6
FABRIC = 200e9  # bytes/s between GPUs; two thirds of what travels hide behind computing


@dataclass
class Machine:
    """GPUs of one kind, and the main memory that they share."""

    gpus: int
    gib: float
    """that a process may take of a GPU"""
    card: str = ""
    """a name that has one of CARDS in it; unknown ones have no times"""
    main_gib: float = float("inf")

    def rates(self) -> tuple[float, float] | None:
        return next((rates for name, rates in CARDS.items() if name in self.card), None)


@dataclass
class Layout:
    """How a strategy spreads a run."""

    strategy: str
    """single, ddp, fsdp2, zero2 or zero3"""
    offload: str = "none"
    """none, cpu or nvme: where optimizer state lies, and under fsdp2 and zero3 weights too"""

    @property
    def sharded(self) -> bool:
        return self.strategy in ("fsdp2", "zero3")


@dataclass
class Size:
    """Of a model, in parameters, and of its micro-batch, traced."""

    trained: int
    frozen_bytes: int
    largest_block: int
    root: int
    """outside of the repeated blocks"""
    streamed: dict[int, tuple[int, int]]
    """{blocks streamed: (parameters that stream, of the largest block)}"""
    traced: Traced
    batch: int
    """that it was traced with"""
    tensors: int
    """that train"""
    dequantized: int = 0
    """bytes of the largest layer that is kept in 4 bits, for its visit in 16"""


def machine_of(text: str) -> Machine | None:
    """4x24 -> four GPUs of 24 GB, of which a process can use 98.5%. ValueError for another form."""
    if not text:
        return None
    found = re.fullmatch(r"(\d+)\s*x\s*(\d+)(?:\s*GB)?", text, re.IGNORECASE)
    if not found or 0 in map(int, found.groups()):
        raise ValueError(f"gpus is {text!r}; expected the number of GPUs and the gigabytes of each, as in 4x24")
    gpus, gigabytes = map(int, found.groups())
    return Machine(gpus, 0.985 * gigabytes, CARDS_GB.get(gigabytes, ""))


def promised(argv: Sequence[str]) -> str:
    """The machine that the header of --config names, as 4x80; "" where it names none."""
    file = Path(argv[argv.index("--config") + 1]) if "--config" in argv else Path()
    header = file.read_text() if file.is_file() else ""
    found = re.search(r"Hardware: (\d+) (?:x|GPU of) (?:[A-Z]\w* )?(\d+) ?GB", header)
    return "x".join(found.groups()) if found else ""


def read_layout(recipe_dir: Path, launch: str) -> Layout:
    """A launch file of the recipe. ValueError when there is none of this name."""
    file = recipe_dir / "accelerate" / f"{launch}.yaml"
    if not file.is_file():
        there = ", ".join(sorted(path.stem for path in file.parent.glob("*.yaml")))
        raise ValueError(f"no launch file {launch!r}, there are: {there}")
    content = yaml.safe_load(file.read_text())
    kind = content["distributed_type"]
    if kind == "FSDP":
        return Layout("fsdp2", "cpu" if content["fsdp_config"].get("fsdp_offload_params") else "none")
    if kind == "DEEPSPEED":
        zero = json.loads((recipe_dir / content["deepspeed_config"]["deepspeed_config_file"]).read_text())
        zero = zero["zero_optimization"]
        return Layout(f"zero{zero['stage']}", zero.get("offload_optimizer", {}).get("device", "none"))
    return Layout("single" if kind == "NO" else "ddp")


def size_of(model: nn.Module, traced: Traced, batch: int, compute_bytes: int) -> Size:
    blocks = repeated_blocks(model)
    counts = [sum(p.numel() for p in block.parameters()) for block in blocks]
    quantized = [p for p in model.parameters() if hasattr(p, "quant_state")]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    frozen_bytes = sum(p.numel() * (NF4_BYTES if hasattr(p, "quant_state") else compute_bytes) for p in frozen)
    streamed = {}
    for wanted in range(1, len(blocks) + 1):
        groups = [sum(p.numel() for p in group) for _, group in blocks_to_stream(model, wanted)]
        streamed[wanted] = (sum(groups), max(groups))
    return Size(
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        frozen_bytes=int(frozen_bytes),
        largest_block=max(counts, default=0),
        root=sum(p.numel() for p in model.parameters()) - sum(counts),
        streamed=streamed,
        traced=traced,
        batch=batch,
        tensors=sum(p.requires_grad for p in model.parameters()),
        dequantized=max((2 * p.numel() for p in quantized), default=0),
    )


def weight_bytes(cfg: Shared, layout: Layout) -> int:
    """Of a weight that trains, and of its gradient."""
    if cfg.precision.mixed_precision != "bf16":
        return 4
    return 2 if layout.strategy.startswith("zero") or cfg.tuning.optimizer in KEEPS_PRECISION else 4


def gpu_gib(cfg: Shared, size: Size, layout: Layout, gpus: int) -> dict[str, float]:
    """GiB of each GPU by part; their sum is the most that is taken at a time."""
    batch, tuning, zero = cfg.batch.train_batch_size, cfg.tuning, layout.strategy.startswith("zero")
    each = weight_bytes(cfg, layout)
    shards = gpus if layout.sharded else 1
    state = 12 if zero else STATE_BYTES[tuning.optimizer]
    parameters, state = each * size.trained / shards, state * size.trained / (gpus if zero else shards)
    frozen = size.frozen_bytes / shards
    gradients = 0.0 if tuning.gradient_release else each * size.trained / (gpus if zero else shards)
    kept = size.traced.kept * batch / size.batch
    transient = (size.traced.peak - size.traced.kept) * batch / size.batch + size.dequantized
    if tuning.stream_blocks:
        wanted = max(size.streamed) if tuning.stream_blocks < 0 else min(tuning.stream_blocks, max(size.streamed))
        streamed, largest = size.streamed[wanted]
        share = 1 - (streamed - N_SLOTS * largest) / (size.trained + size.frozen_bytes / 2)
        parameters, frozen, state = parameters * share, frozen * share, state * share
    if layout.sharded:  # two blocks whole, one more's gradients, and what is in no block
        transient += (3 * size.largest_block + size.root) * 2
    if layout.offload != "none":
        state = 0.0
        parameters, frozen, gradients = (0.0, 0.0, 0.0) if layout.sharded else (parameters, frozen, gradients)
    if layout.strategy in ("ddp", "zero2"):  # buckets of gradients on their way
        transient += ZERO_BUCKETS if zero else each * size.trained
    casts = 0 if zero or layout.sharded or each == 2 or cfg.precision.mixed_precision == "no" else 2 * size.trained
    averages = 6 * size.trained / shards if tuning.ema_decay and not tuning.stream_blocks else 0.0
    if gradients and cfg.batch.gradient_accumulation_steps == 1:  # they come as activations go
        kept = max(kept - gradients, 0.0)
    parts = {
        "parameters": parameters + frozen,
        "gradients": gradients,
        "optimizer state": state + averages,
        "activations beside gradients": kept,
        "temporary": transient + casts,
    }
    return {name: value / GIB for name, value in parts.items()}


def main_gib(cfg: Shared, size: Size, layout: Layout, gpus: int) -> dict[str, float]:
    """GiB of main memory of one machine: what its processes take, and of that what is pinned."""
    pinned = 0.0
    if layout.offload == "cpu":
        pinned = (16 if layout.sharded else 14) * size.trained + (size.frozen_bytes if layout.sharded else 0)
    if cfg.tuning.stream_blocks:
        wanted = max(size.streamed) if cfg.tuning.stream_blocks < 0 else cfg.tuning.stream_blocks
        share = size.streamed[min(wanted, max(size.streamed))][0] / (size.trained + size.frozen_bytes / 2)
        each = weight_bytes(cfg, layout) + STATE_BYTES[cfg.tuning.optimizer]
        pinned = share * (each * size.trained + size.frozen_bytes + (4 * size.trained if cfg.tuning.ema_decay else 0))
    if cfg.tuning.offload_activations:
        pinned += gpus * size.traced.kept * cfg.batch.train_batch_size / size.batch
    return {"main memory": gpus * PROCESS_GIB + pinned / GIB, "of it pinned": pinned / GIB}


def checkpoint_gib(cfg: Shared, size: Size, layout: Layout) -> float:
    """Of one checkpoint."""
    more = 2 if layout.strategy.startswith("zero") else 0
    return (CHECKPOINT_BYTES[cfg.tuning.optimizer] + more) * size.trained / GIB


def seconds_a_step(cfg: Shared, size: Size, layout: Layout, machine: Machine) -> float | None:
    """Computed; None on a card without rates."""
    rates = machine.rates()
    if rates is None or layout.offload != "none":
        return None
    flops, bandwidth = rates
    batch, compiled, each = cfg.batch.train_batch_size, cfg.speed.compile, weight_bytes(cfg, layout)
    share = COMPILED_SHARE if compiled else EAGER_SHARE
    computing = size.traced.flops * batch / size.batch / (flops * share) + size.traced.kernels * KERNEL
    launch = LAUNCH_RECOMPUTED if cfg.speed.gradient_checkpointing else LAUNCH
    launching = 0.0 if compiled or getattr(cfg, "cuda_graphs", False) else size.traced.kernels * launch
    copying = 0.0
    if cfg.tuning.stream_blocks:
        copying = 2 * main_gib(cfg, size, layout, 1)["of it pinned"] * GIB / LINK
    shards = machine.gpus if layout.sharded else 1
    moved = 2 * (2 * each + STATE_BYTES[cfg.tuning.optimizer]) * size.trained / shards
    updating = moved / bandwidth + (size.tensors * UPDATE if cfg.tuning.gradient_release else 0.0)
    travelling = 3 * 2 * (size.trained + size.frozen_bytes / 2) / FABRIC / 3 if layout.sharded and shards > 1 else 0.0
    micro_step = max(computing, launching, copying) + travelling
    return cfg.batch.gradient_accumulation_steps * micro_step + updating


def available() -> Machine | None:
    """This machine's GPUs; None without any."""
    if not torch.cuda.is_available():
        return None
    import psutil

    card = torch.cuda.get_device_properties(0)
    free = psutil.virtual_memory().available / GIB
    return Machine(torch.cuda.device_count(), card.total_memory / GIB, card.name, free)
