"""What training takes from the data: samples by their place, micro-batches, the loader."""

import atexit
import signal
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from common.data import cache, order
from common.data.cache import EmbeddingCache
from common.data.images import loss_mask, resize_and_crop
from common.data.manifest import Record, load_image
from common.data.order import MicroBatchSampler, Place
from common.processes import Run
from common.settings import Batch, Bucketed, Shared

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
    """Entries of a cache, by their places. records: their rows; of several captions each epoch draws one, and those
    after the first are entries of texts alone. mask(number, latents): the loss_mask of a row."""

    def __init__(
        self,
        cache: EmbeddingCache,
        keys: Sequence[str],
        records: Sequence[Record] = (),
        mask: Callable[[int, Tensor], Tensor] | None = None,
    ):
        self.cache, self.keys, self.mask = cache, list(keys), mask
        several = {index: record.captions for index, record in enumerate(records) if record.other_texts}
        self.captions = {index: ["", *map(cache.key, texts[1:])] for index, texts in several.items()}

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, place: Place) -> dict:
        caption = place.draw(self.captions.get(place.sample, [""]))  # "" is the one in the row's own entry
        other = self.cache[caption] if caption else {}
        return {**self.row(place.sample), **other, **of_place(place)}

    def row(self, number: int) -> dict[str, Tensor]:
        """The tensors of one row, with its first caption."""
        entry = self.cache[self.keys[number]]
        return entry | ({"loss_mask": self.mask(number, entry["latents"])} if self.mask else {})


def other_texts(records: Iterable[Record]) -> list[str]:
    """The rows' captions after the first, to be encoded as texts alone."""
    return [text for record in records for text in record.other_texts]


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


def encoded_rows(
    run: Run,
    cfg: Bucketed,
    embeddings: EmbeddingCache,
    rows: tuple[Sequence[Record], Sequence[Record]],
    texts: Iterable[str],
    encode: Callable[[dict[str, cache.Item]], None],
    shape_ids: Sequence | None = None,
) -> Data:
    """The data of rows (to train on, held out) whose caption is the whole prompt: each at its bucket, with what
    encode({key: item}) adds to the cache of rows and of texts, the empty one among them. shape_ids: of the rows to
    train on."""
    train, held_out = rows
    both, count = [*train, *held_out], len(train)
    buckets = order.choose_buckets(both, cfg.buckets.resolution, cfg.buckets.bucket_multiple)  # (width, height)
    keys = [embeddings.key(row, bucket) for row, bucket in zip(both, buckets, strict=True)]
    wanted = rows_to_encode(run, cfg, both, buckets[:count], shape_ids)
    items: dict[str, cache.Item] = {keys[number]: (row, buckets[number]) for number, row in wanted.items()}
    items |= {embeddings.key(text): (text, None) for text in ("", *texts, *other_texts(wanted.values()))}
    cache.encode_missing(run, embeddings, items, encode)

    def samples(part: slice) -> CachedSamples:
        mask = partial(read_mask, cfg.data.train_data_dir, cfg.flow.mask_column, both[part], buckets[part])
        return CachedSamples(embeddings, keys[part], both[part], mask if cfg.flow.mask_column else None)

    unseen = samples(slice(count, None))
    run.print(f"{count} rows to train on, {len(held_out)} held out; {order.describe_buckets(both, buckets)}")
    return Data(
        dataset=samples(slice(count)),
        bucket_ids=buckets[:count],
        shape_ids=shape_ids,
        digest=order.data_digest(train, buckets[:count]),
        empty_prompt=embeddings[embeddings.key("")],
        held_out=[unseen.row(number) for number in range(len(unseen))],
    )


def read_mask(
    train_data_dir: str, column: str, rows: Sequence[Record], buckets: Sequence, number: int, latents: Tensor
) -> Tensor:
    """The loss_mask of a row at its bucket, from the picture in its column."""
    image = load_image(rows[number], train_data_dir, column, at_least=buckets[number])
    return loss_mask(resize_and_crop(image, buckets[number]), latents)


def make_sampler(
    data: Data, batch: Batch, run: Run, seed: int, segments: Sequence[Sequence[int]], start_step: int
) -> MicroBatchSampler:
    """This process's micro-batches, from the step that a checkpoint's segments lead to."""
    run.rows = {"train": len(data), "held_out": len(data.held_out), "shown": len(data.shown)}
    sizes = Counter(bucket for bucket in data.bucket_ids if isinstance(bucket, tuple))  # (width, height)
    run.rows["buckets"] = {" x ".join(map(str, size)): count for size, count in sizes.most_common()}
    run.rows |= run.data_sets
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
