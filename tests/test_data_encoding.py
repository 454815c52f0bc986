"""The encoding stage with encoders that only count: which rows are a batch, what is read ahead, and what a GPU that is
full does."""

import threading
import time
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from common.data import encoding
from common.data.cache import EmbeddingCache
from common.image_settings import Pictures
from common.processes import Run


class Counting:
    """Items are (text, (width, height) or None). An item's entry is its text's length, and its pixels' mean."""

    def __init__(self, room: int = 100, seconds: float = 0.0) -> None:
        self.batches, self.threads, self.room, self.seconds = [], set(), room, seconds

    def shape(self, item: tuple) -> tuple:
        return item[1], len(item[0])

    def read(self, item: tuple) -> dict[str, Tensor]:
        if item[0] == "bad":
            raise ValueError("cannot be read")
        self.threads.add(threading.current_thread().name)
        return {"pixels": torch.full((3, *item[1][::-1]), float(len(item[0])))} if item[1] else {}

    def encode(self, items: list[tuple], read: dict[str, Tensor]) -> dict[str, Tensor]:
        if len(items) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        time.sleep(self.seconds)
        self.batches.append([text for text, _ in items])
        lengths = {"length": torch.tensor([len(text) for text, _ in items])}
        return lengths | ({"mean": read["pixels"].mean((1, 2, 3))} if read else {})


def process(rank: int = 0, world_size: int = 1, device: str = "cpu") -> Run:
    """A process of a run, without the others."""
    names = {"device": torch.device(device), "process_index": rank, "num_processes": world_size}
    accelerator = SimpleNamespace(**names, is_main_process=rank == 0)
    paths = {"strategy": "single", "launch": "single", "offload": False, "recipe_dir": None, "accumulation": 1}
    dtypes = {"compute_dtype": torch.float32, "weights_dtype": torch.float32}
    return Run(accelerator, **paths, **dtypes, fsdp={}, benchmark=False, validates=False, resume=None)


def items_of(count: int) -> dict[str, tuple]:
    """Texts of lengths that go up and down, at two sizes and at none."""
    shapes = ((8, 4), (4, 8), None)
    return {f"key{n}": ("x" * (1 + 7 * n % 10), shapes[n % 3]) for n in range(count)}


def encode(folder, items: dict, encoders: Counting, batch_size: int, run: Run | None = None) -> EmbeddingCache:
    embeddings = EmbeddingCache(folder, {})
    encoding.encode_items(run or process(), embeddings, items, encoders, Pictures(encode_batch_size=batch_size))
    embeddings.flush()
    return embeddings


def test_every_item_gets_its_own_tensors(tmp_path):
    """Catches rows of a batch that are mixed up, batches of unequal sizes, texts that are not sorted by length, an
    equal item that is encoded twice, and pictures that are read by the thread that encodes."""
    items = items_of(30)
    items |= {"again": items["key0"]}
    encoders = Counting()
    found = encode(tmp_path, items, encoders, 4)
    for key, (text, size) in items.items():
        assert found[key]["length"].item() == len(text)
        assert ("mean" in found[key]) == (size is not None)
        assert size is None or found[key]["mean"].item() == len(text)
    sizes = [len(batch) for batch in encoders.batches]
    distinct = len(set(items.values()))
    assert sum(sizes) == distinct < 31 and max(sizes) == 4 and len(sizes) < 1 + distinct / 3
    lengths = [[len(text) for text in batch] for batch in encoders.batches]
    assert all(batch == sorted(batch) for batch in lengths)
    assert threading.current_thread().name not in encoders.threads


@pytest.mark.parametrize(("device", "most"), [("cpu", 1), ("cuda", 4)])
def test_batch_size_by_device(tmp_path, device, most):
    """Catches a default that changes the last bits of what a CPU encodes, or leaves a GPU with single rows."""
    encoders = Counting()
    encode(tmp_path, items_of(30), encoders, 0, process(device=device))
    assert max(map(len, encoders.batches)) == most


def test_a_full_gpu_takes_smaller_batches(tmp_path):
    """Catches a run that ends where the batch has no room, rows that are lost or mixed up by halving, and one that
    goes on for ever where a single row has none."""
    encoders = Counting(room=2)
    items = {f"key{n}": ("x" * n, (8, 4)) for n in range(1, 8)}
    found = encode(tmp_path, items, encoders, 7)
    assert all(found[key]["mean"].item() == len(text) for key, (text, _) in items.items())
    assert sorted(map(len, encoders.batches)) == [1, 2, 2, 2]
    with pytest.raises(torch.OutOfMemoryError):
        encode(tmp_path / "none", items, Counting(room=0), 7)


def test_processes_share_whole_batches(tmp_path):
    """Catches batches that depend on the number of processes, and rows that nobody or everybody encodes."""
    alone, shared = Counting(), [Counting() for _ in range(2)]
    encode(tmp_path / "alone", items_of(40), alone, 4)
    for rank, encoders in enumerate(shared):
        encode(tmp_path / "shared", items_of(40), encoders, 4, process(rank, 2))
    assert sorted(alone.batches) == sorted(batch for each in shared for batch in each.batches)
    assert len(EmbeddingCache(tmp_path / "shared", {})) == 40


def test_an_error_of_a_reader_ends_the_stage(tmp_path):
    """Catches a picture that cannot be read any more and is passed over, or that waits for the rest of the data."""
    encoders, items = Counting(seconds=0.002), {f"key{n}": (str(n), (8, 4)) for n in range(2000)}
    items["key20"] = ("bad", (8, 4))
    with pytest.raises(ValueError, match="cannot be read"):
        encode(tmp_path, items, encoders, 4)
    assert sum(map(len, encoders.batches)) < 200
