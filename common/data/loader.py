"""What training takes from the data: samples by their place, micro-batches, the loader."""

import atexit
import signal
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from common.data.cache import EmbeddingCache
from common.data.order import MicroBatchSampler, Place
from common.processes import Run
from common.settings import Batch, Shared

Row = TypeVar("Row")
RANDOM_ROWS = 64  # of a benchmark


@dataclass
class Data:
    """A run's data after the check and the encoding, or random numbers in its place."""

    dataset: Dataset
    """by Place: one row's tensors, and its place in the step"""
    bucket_ids: Sequence
    """what all samples of a step have in common"""
    shape_ids: Sequence | None = None
    """what the samples of a micro-batch have in common beside their bucket"""
    digest: str = ""
    """of rows and buckets, to notice on resume that the data changed"""
    empty_prompt: dict[str, Tensor] = field(default_factory=dict)
    """tensors of the encoded empty caption"""
    held_out: Sequence[dict[str, Tensor]] = ()
    """encoded rows for the validation loss"""
    shown: Sequence[Any] = ()
    """what validation draws"""

    def __len__(self) -> int:
        return len(self.bucket_ids)


class CachedSamples(Dataset):
    """Entries of a cache, by their places."""

    def __init__(self, cache: EmbeddingCache, keys: Sequence[str]):
        self.cache, self.keys = cache, list(keys)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, place: Place) -> dict:
        return {**self.cache[self.keys[place.sample]], **of_place(place)}


class RandomSamples(Dataset):
    """Random numbers of an encoded row's shapes: make(generator) gives one row's tensors."""

    def __init__(self, make: Callable[[torch.Generator], dict[str, Tensor]]):
        self.make = make

    def __len__(self) -> int:
        return RANDOM_ROWS

    def __getitem__(self, place: Place) -> dict:
        return {**self.make(torch.Generator().manual_seed(place.sample)), **of_place(place)}


def random_data(cfg: Any, config: dict, random_sample: Callable[[Any, dict, torch.Generator], dict]) -> Data:
    """A benchmark's data. random_sample(cfg, config, generator) is the recipe's: what one encoded row looks like at
    full size; the first one's prompt stands for the empty caption."""
    make = partial(random_sample, cfg, config)
    sample = make(torch.Generator().manual_seed(RANDOM_ROWS))
    empty_prompt = {name: tensor for name, tensor in sample.items() if "prompt_embeds" in name}
    return Data(RandomSamples(make), [0] * RANDOM_ROWS, empty_prompt=empty_prompt)


def of_place(place: Place) -> dict[str, int]:
    return {"step": place.step, "position": place.position, "group_size": len(place.group)}


def collate(samples: Sequence[dict]) -> dict:
    """One micro-batch: tensors of one shape are stacked to (B, ...), others stay a list of B; whatever a row brings is
    passed on. step and group_size are numbers, positions a list of B."""
    batch: dict[str, Any] = {}
    for name in samples[0]:
        values = [sample[name] for sample in samples]
        equal = isinstance(values[0], Tensor) and len({value.shape for value in values}) == 1
        batch[name] = torch.stack(values) if equal else values
    if "position" in batch:
        batch |= {"step": batch["step"][0], "group_size": batch["group_size"][0], "positions": batch.pop("position")}
    return batch


def rows_to_encode(
    run: Run, cfg: Shared, rows: Sequence[Row], bucket_ids: Sequence, shape_ids: Sequence | None = None
) -> dict[int, Row]:
    """{number: row} of all rows; in a dry run those of the first micro-batch, which are its first_rows. bucket_ids,
    shape_ids: of the rows to train on, which come first."""
    if not cfg.run.dry_run:
        return dict(enumerate(rows))
    data = Data(RandomSamples(dict), bucket_ids, shape_ids)
    places = next(iter(make_sampler(data, cfg.batch, run, cfg.run.seed, (), 0)))
    run.first_rows = {place.sample: rows[place.sample] for place in places}
    return run.first_rows


def make_sampler(
    data: Data, batch: Batch, run: Run, seed: int, segments: Sequence[Sequence[int]], start_step: int
) -> MicroBatchSampler:
    """This process's micro-batches, from the step that a checkpoint's segments lead to."""
    run.rows = {"train": len(data), "held_out": len(data.held_out), "shown": len(data.shown)}
    sizes = Counter(bucket for bucket in data.bucket_ids if isinstance(bucket, tuple))  # (width, height)
    run.rows["buckets"] = {" x ".join(map(str, size)): count for size, count in sizes.most_common()}
    return MicroBatchSampler(
        data.bucket_ids,
        batch.train_batch_size,
        batch.gradient_accumulation_steps,
        run.rank,
        run.world_size,
        seed,
        segments,
        start_step,
        data.shape_ids,
    )


def _init_worker(worker_id: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach the whole process group, but the trainer has yet to finish its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))  # the second one ends it


def make_loader(
    dataset: Dataset, sampler: Sampler, num_workers: int, seed: int, collate: Callable = collate
) -> Iterator:
    """Endless iterator of collate([dataset[index, step, position], ...]). accelerate must not prepare it again."""
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=num_workers,
        worker_init_fn=_init_worker,
        persistent_workers=num_workers > 0,
        prefetch_factor=4 if num_workers else None,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(seed),  # the global generator is left alone
    )
    iterator = iter(loader)
    if num_workers:  # after a crash too: multiprocessing would send each worker one SIGTERM and wait for ever
        weak = weakref.ref(iterator)
        atexit.register(lambda: None if weak() is None else weak()._shutdown_workers())
    return iterator
