"""A run's processes: who is main, what all agree on, and when to stop. The ground floor: it knows no other room."""

import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from common.progress import progress_bar, stage

Item = TypeVar("Item")
Result = TypeVar("Result")


class DiskFull(ValueError):
    """A checkpoint that could not be written: nothing to be tried again before somebody has made room."""


@dataclass
class Stop:
    """Whether this process was asked to stop, and whether all have agreed to."""

    is_training: bool = False
    """before that there is nothing to save, and a run stops at once"""
    asked: bool = False
    agreed: bool = False
    reason: str = ""


stop = Stop()  # one for a process, since signals are


class Release(Protocol):
    """Gradient release, which keeps the gradient norm (step/optimizers.py)."""

    def finish(self) -> None: ...

    def grad_norm(self, sharded: bool) -> float: ...


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
    accumulation: int
    """micro-steps of an optimizer step"""
    compute_dtype: torch.dtype
    weights_dtype: torch.dtype
    """of the weights that train"""
    fsdp: dict[str, str]
    """FSDP_* variables of the launch file"""
    benchmark: bool
    validates: bool
    resume: Path | None
    """the checkpoint to go on from"""
    release: Release | None = None
    trained_share: float = 1.0
    """of the model's parameters, for the MFU: frozen weights have no gradients of their own"""
    rows: dict[str, Any] = field(default_factory=dict)
    """for the report: how many rows there are, of what sizes"""
    data_sets: dict[str, int] = field(default_factory=dict)
    """for the report: rows to train on of each data set, where there are several"""
    first_rows: dict[int, Any] = field(default_factory=dict)
    """of a dry run: the rows of the first micro-batch, by number"""

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
        if self.is_main and sys.stderr.isatty():
            tqdm.write(" ".join(map(str, words)), file=sys.stdout)
        elif self.is_main:
            print(*words, flush=True)

    def progress(self, items: Iterable[Item], title: str, total: int | None = None) -> Iterator[Item]:
        """The items, with a progress bar on the main process, as the stage that the title's first word names. total:
        how many there are, of what has no length."""
        total = len(items) if total is None else total
        with stage(title.split()[0], total * self.world_size):
            yield from progress_bar(items, title, total, disable=not self.is_main)

    def unwrap(self, model: torch.nn.Module) -> torch.nn.Module:
        """The bare model inside what the strategy wraps around it."""
        return model if self.strategy == "fsdp2" else self.accelerator.unwrap_model(model)

    def barrier(self) -> None:
        if self.world_size > 1:
            torch.distributed.barrier()

    def share_of(self, items: Sequence[Item]) -> Sequence[Item]:
        """This process's part of what all have to do."""
        return items[self.rank :: self.world_size]

    def in_step(self, items: Sequence[Item]) -> Iterator[tuple[int, Item, bool]]:
        """(index, item, whether it counts) of this process's share, as many on every process.

        Sharded weights are gathered inside forward, so all processes must do as many forwards: those past the end do
        an item again, which does not count.
        """
        for start in self.progress(range(0, len(items), self.world_size), "validate"):
            index = start + self.rank
            yield index, items[index % len(items)], index < len(items)

    def mean_of(self, values: Sequence[Tensor]) -> float | None:
        """Mean of the scalars of all processes; None where none has any."""
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        for value in values:
            total += torch.stack([value.double(), torch.ones_like(value).double()])
        if self.world_size > 1:
            torch.distributed.all_reduce(total)
        return (total[0] / total[1]).item() if total[1] else None

    def agree_to_stop(self) -> None:
        """Called once a step by every process: a signal that reached one of them stops all after the same step."""
        asked = torch.tensor(float(stop.asked), device=self.device)
        if self.world_size > 1:
            torch.distributed.all_reduce(asked)
        stop.agreed = stop.agreed or asked.item() > 0

    def stop_requested(self) -> bool:
        """Whether all have agreed to stop (SIGTERM, SIGUSR1, Ctrl-C), or training is done early."""
        return stop.agreed

    def request_stop(self, reason: str) -> None:
        """End the loop after this step, because training is done (early stopping). Called on every process."""
        stop.agreed, stop.reason = True, reason

    def end(self) -> None:
        """Ends the trackers and the processes' group: nothing collective may follow."""
        self.accelerator.end_training()


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return platform.processor() or platform.machine()


def on_main(run: Run, function: Callable[..., Result], *arguments: Any, **settings: Any) -> Result:
    """Call a function on the main process and give every process its result; its ValueError is raised on all of
    them."""
    outcome: list[Any] = [None, None]
    if run.is_main:
        try:
            outcome[0] = function(*arguments, **settings)
        except ValueError as error:
            outcome[1] = error
    if run.world_size > 1:
        torch.distributed.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise ValueError(str(outcome[1]))
    return outcome[0]
