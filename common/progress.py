"""How far a run is, and where its time goes: bars that a log file can hold, and the stages of a run."""

import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

SECONDS_BETWEEN_LINES, WORTH_A_LINE = 30, 5  # seconds, in a log file


class LogLines:
    """What tqdm is on a terminal, for a log file: a line every half a minute, and one at the end of what took long."""

    def __init__(self, items: Iterable | None, desc: str, total: int | None, initial: int, unit: str):
        self.items, self.desc, self.total, self.initial, self.n, self.unit = items, desc, total, initial, initial, unit
        self.began = self.said = time.monotonic()
        self.postfix, self.closed = "", False

    def __iter__(self) -> Iterator:
        for item in self.items or ():
            yield item
            self.update(1)
        self.close()

    def __enter__(self) -> "LogLines":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def update(self, n: int = 1) -> None:
        self.n += n
        if time.monotonic() - self.said > SECONDS_BETWEEN_LINES:
            self._say()

    def set_postfix(self, values: dict[str, str], refresh: bool = True) -> None:
        self.postfix = "".join(f", {name} {value}" for name, value in values.items())

    def close(self) -> None:
        if not self.closed and self.n > self.initial and time.monotonic() - self.began > WORTH_A_LINE:
            self._say()
        self.closed = True

    def _say(self) -> None:
        self.said = time.monotonic()
        done, seconds = self.n - self.initial, max(self.said - self.began, 1e-9)
        of = f" of {self.total}" if self.total else ""
        left = (
            f", {tqdm.format_interval((self.total - self.n) * seconds / done)} left"
            if of and self.n < self.total
            else ""
        )
        rate = a_second(done, seconds)
        print(
            f"{self.desc}: {self.n}{of} {self.unit}, {rate} a second{left}{self.postfix}", file=sys.stderr, flush=True
        )


def progress_bar(
    items: Iterable | None = None,
    desc: str = "",
    total: int | None = None,
    initial: int = 0,
    unit: str = "items",
    disable: bool = False,
) -> Any:
    """Items with their rate and the time left: tqdm's bar on a terminal, LogLines elsewhere."""
    total = len(items) if total is None and hasattr(items, "__len__") else total
    if disable or sys.stderr.isatty():
        settings = {"unit": f" {unit}", "disable": disable, "dynamic_ncols": True}
        return tqdm(items, desc, total, leave=None, initial=initial, **settings)
    return LogLines(items, desc, total, initial, unit)


@dataclass
class Stages:
    """What a run spent its time on, a row each; kept back until the run's folder is this run's."""

    began: float = field(default_factory=time.perf_counter)
    rows: list[dict[str, Any]] = field(default_factory=list)
    file: Path | None = None
    current: dict[str, Any] | None = None
    """the stage that others are a part of"""

    def begin(self) -> None:
        self.__init__()

    def add(self, name: str, seconds: float, items: int, peak_memory_gib: float) -> None:
        row = {"stage": name, "seconds": round(seconds, 3), "items": items, "peak_memory_gib": peak_memory_gib}
        self.rows.append(row)
        if self.file is not None:
            with open(self.file, "a") as opened:
                opened.write(json.dumps(row) + "\n")

    def write_to(self, file: Path, goes_on: bool) -> None:
        """From now on, and what there is so far; goes_on: after the rows that are there."""
        with open(file, "a" if goes_on else "w") as opened:
            opened.writelines(json.dumps(row) + "\n" for row in self.rows)
        self.file = file


stages = Stages()  # of this process, since a process is one run


@contextmanager
def stage(name: str, items: int = 0) -> Iterator[dict[str, Any]]:
    """Around a stage of the run. A stage inside another is a part of that one: only its items count. The row that is
    yielded has `items`, for who knows how many only later."""
    row = {"name": name, "items": items}
    if stages.current is not None:
        yield row
        stages.current["items"] += row["items"]
        return
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    began, stages.current = time.perf_counter(), row
    try:
        yield row
    finally:
        stages.current = None
    stages.add(name, time.perf_counter() - began, row["items"], peak_memory_gib())
    if torch.cuda.is_initialized():  # the next stage's peak is its own
        torch.cuda.reset_peak_memory_stats()


def peak_memory_gib() -> float:
    """GiB in use at most: on a GPU what torch allocated in this stage, else the process's largest resident set so
    far."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def a_second(items: float, seconds: float) -> str:
    """ "" where there is nothing to divide."""
    rate = items / seconds if items and seconds else 0.0
    return f"{rate:.0f}" if rate >= 100 else f"{rate:.3g}" if rate else ""


def by_stage(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each stage, in the order of their first: seconds and items added up, the largest peak."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        so_far = found.setdefault(row["stage"], {"stage": row["stage"], "seconds": 0.0, "items": 0, "peak": 0.0})
        so_far["seconds"] += row["seconds"]
        so_far["items"] += row["items"]
        so_far["peak"] = max(so_far["peak"], row["peak_memory_gib"])
    return list(found.values())


def table_of_stages() -> str:
    """For the end of a run: this process's seconds, items, items a second and GiB, by stage."""
    lines = [f"{'stage':<12}{'seconds':>10}{'items':>9}{'items/s':>10}{'peak GiB':>10}"]
    for row in by_stage(stages.rows):
        rate = a_second(row["items"], row["seconds"])
        lines.append(f"{row['stage']:<12}{row['seconds']:>10.1f}{row['items'] or '':>9}{rate:>10}{row['peak']:>10.2f}")
    return "\n".join([*lines, f"{'all':<12}{time.perf_counter() - stages.began:>10.1f}"])
