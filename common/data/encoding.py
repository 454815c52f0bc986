"""The encoding stage: what frozen encoders make of rows, in batches, with the rows' pictures read ahead of them.

A recipe's Encoders say what a batch becomes; here are the batches, the threads that read and write, the progress bar.
An entry of the cache does not know which batch it came from.
"""

import os
from collections import defaultdict, deque
from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from common.data.cache import EmbeddingCache, Item
from common.data.images import image_to_tensor, resize_and_crop
from common.data.loader import collate
from common.data.manifest import Record, load_image
from common.image_settings import Pictures
from common.processes import Run

THREADS = 16  # that read pictures, at most
WINDOW = 64  # items of one shape, in the data's order, of which those with texts of like length go together

Job = tuple[list[str], Any]  # the keys that ask for an item, and the item
Entry = dict[str, Tensor]


class Encoders(Protocol):
    """What is known here of a recipe's frozen encoders. An item is a row at its bucket, a text alone, or what a recipe
    has besides; equal items are encoded once."""

    def shape(self, item: Any) -> tuple[Hashable, int]:
        """(what the items of a batch have in common, the length of an item's text)."""

    def read(self, item: Any) -> dict[str, Any]:
        """An item's pixels, by name; {} of a text. Called by threads, ahead of encode."""

    def encode(self, items: list, read: dict[str, Any]) -> dict[str, Sequence[Tensor]]:
        """What a batch of B items becomes: by name B tensors. read: what there is of them, stacked to (B, ...)."""


def encode_items(
    run: Run, embeddings: EmbeddingCache, items: dict[str, Any], encoders: Encoders, pictures: Pictures
) -> None:
    """Add this process's share of what the encoders make of items.

    Whole batches are shared out: what they become is the same, to the last bit, however many processes there are.
    """
    batch_size = pictures.encode_batch_size or (4 if run.device.type == "cuda" else 1)
    batches = run.share_of(batches_of(items, encoders, batch_size))
    written: deque[Future] = deque()
    with ThreadPoolExecutor(1) as writer:  # a batch goes to the disk while the next one is encoded
        for keys, entry in run.progress(encoded(encoders, batches), "encode", sum(map(len, batches))):
            written.extend(writer.submit(embeddings.add, key, entry) for key in keys)
            while len(written) > WINDOW:
                written.popleft().result()
        for future in written:
            future.result()


def batches_of(items: dict[str, Any], encoders: Encoders, batch_size: int) -> list[list[Job]]:
    """At most batch_size items of one shape, near each other in the data, and of these in the length of their text, so
    that little is padded."""
    keys_of: dict[Any, list[str]] = defaultdict(list)
    for key, item in items.items():
        keys_of[item].append(key)
    by_shape: dict[Hashable, list[tuple[int, Job]]] = defaultdict(list)
    for item, keys in keys_of.items():
        shape, length = encoders.shape(item)
        by_shape[shape].append((length, (keys, item)))
    batches = []
    for alike in by_shape.values():
        for start in range(0, len(alike), WINDOW):
            jobs = [job for _, job in sorted(alike[start : start + WINDOW], key=lambda each: each[0])]
            batches += [jobs[at : at + batch_size] for at in range(0, len(jobs), batch_size)]
    return batches


def encoded(encoders: Encoders, batches: Sequence[list[Job]]) -> Iterator[tuple[list[str], Entry]]:
    """(keys, tensors) of each item."""
    for batch, read in read_ahead(encoders, batches):
        for (keys, _), entry in zip(batch, encode_batch(encoders, [item for _, item in batch], read), strict=True):
            yield keys, entry


def read_ahead(encoders: Encoders, batches: Sequence[list[Job]]) -> Iterator[tuple[list[Job], list[dict]]]:
    """Each batch with what threads have read of its items meanwhile."""
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    threads = min(max(cores, 1), THREADS)
    pool, reading, waiting = ThreadPoolExecutor(threads), deque(), 0
    try:
        for batch in batches:
            reading.append((batch, [pool.submit(encoders.read, item) for _, item in batch]))
            waiting += len(batch)
            while waiting > len(batch) + 2 * threads:
                waiting -= len(reading[0][0])
                yield _done(reading.popleft())
        while reading:
            yield _done(reading.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _done(batch: tuple[list[Job], list[Future]]) -> tuple[list[Job], list[dict]]:
    return batch[0], [future.result() for future in batch[1]]


def encode_batch(encoders: Encoders, items: list, read: list[dict]) -> list[Entry]:
    """The tensors of each item; in halves where the GPU has no room for all of them."""
    try:
        made = encoders.encode(items, collate(read))
        return [{name: values[index] for name, values in made.items()} for index in range(len(items))]
    except torch.OutOfMemoryError:
        if len(items) == 1:
            raise
    torch.cuda.empty_cache()
    half = len(items) // 2
    return encode_batch(encoders, items[:half], read[:half]) + encode_batch(encoders, items[half:], read[half:])


# ---- rows at a bucket, and texts alone


def text_of(item: Item) -> str:
    return item[0] if isinstance(item[0], str) else item[0].text


def read_pixels(record: Record, train_data_dir: str | Path, bucket: tuple[int, int]) -> Tensor:
    """(3, H, W) in [-1, 1]: a row's picture, cut to its bucket (width, height)."""
    return image_to_tensor(resize_and_crop(load_image(record, train_data_dir, at_least=bucket), bucket))
