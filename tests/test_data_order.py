"""common/data/order.py and loader.py: buckets, the order of samples, their places, the loader."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from itertools import chain, islice

import pytest
import torch
from helpers import ROOT

from common.data import loader, order
from common.data.manifest import Record

# ---- buckets


@pytest.mark.parametrize("resolution", [32, 64, 96, 256, 512, 768, 1024, 1328])
def test_buckets(resolution):
    """Catches buckets off their multiple, area or aspect, and a portrait without its landscape."""
    if resolution % 32:
        with pytest.raises(
            ValueError, match=f"resolution is {resolution}; expected a multiple of 32, for example 1344"
        ):
            order.make_buckets(resolution)
        return
    buckets = order.make_buckets(resolution)
    assert (resolution, resolution) in buckets
    assert {(height, width) for width, height in buckets} == set(buckets)
    for width, height in buckets:
        assert width % 32 == height % 32 == 0 and 0.5 <= width / height <= 2
        assert 0.8 <= width * height / resolution**2 <= 1.25
    assert len(buckets) == len(set(buckets)) and (resolution < 256 or len(buckets) > 6)


@pytest.mark.parametrize("size", [(1328, 1328), (1664, 928), (928, 1664), (1472, 1104), (1104, 1472)])
def test_the_sizes_of_qwen_image(size):
    """Catches a resolution of 1328 that is refused, and pictures of the model's own sizes that are scaled or cut."""
    assert size in order.make_buckets(1328, 16)
    picture = Record(0, "0.png", "x", digest="d", width=size[0], height=size[1])
    assert order.choose_buckets([picture], 1328, 16) == [size]


def test_nearest_bucket():
    """Catches width and height exchanged, and very long pictures without a bucket."""
    buckets = order.make_buckets(1024)
    assert order.nearest_bucket(640, 640, buckets) == (1024, 1024)
    width, height = order.nearest_bucket(1920, 1080, buckets)
    assert width > height and abs(width / height - 16 / 9) < 0.06
    assert order.nearest_bucket(1080, 1920, buckets) == (height, width)
    assert order.nearest_bucket(9000, 100, buckets)[0] == max(width for width, _ in buckets)


def test_data_digest():
    """Catches changed data that goes unnoticed on resume, and moved files or mended captions that do not."""
    records = [Record(number, f"{number}.png", "x", digest=f"d{number}") for number in range(3)]
    digest = order.data_digest(records, [0, 1, 0])
    moved = [Record(9, "moved.png", "new caption", digest=record.digest) for record in records]
    assert digest == order.data_digest(moved, [0, 1, 0])
    others = [
        order.data_digest(records, [0, 1, 1]),
        order.data_digest(records[::-1], [0, 1, 0]),
        order.data_digest(records[:2], [0, 1]),
        order.data_digest([*records[:2], Record(2, "2.png", "x", digest="other")], [0, 1, 0]),
        order.data_digest(records, [(64, 32), (32, 64), (64, 32)]),
    ]
    assert len({digest, *others}) == 6
    assert digest == "927aea82def0182cf1700d8aae09eb7e"  # checkpoints keep it
    with pytest.raises(ValueError, match="zip"):
        order.data_digest(records, [0, 1])


# ---- the order of samples

BUCKET_IDS = [0] * 11 + [1] * 6 + [2] * 2  # sizes that no group size divides


def take(n, **kwargs):
    defaults = {"train_batch_size": 1, "gradient_accumulation_steps": 1, "rank": 0, "world_size": 1, "seed": 3}
    sampler = order.MicroBatchSampler(BUCKET_IDS, **(defaults | kwargs))
    return list(islice(sampler, n * sampler.accumulation))


def sample_groups(*arguments):
    """step_groups without the epochs."""
    return ([sample for sample, _ in group] for group in order.step_groups(*arguments))


def steps_of_all_ranks(n, world_size, batch, accumulation, **kwargs):
    """[{position: index} of each step], put together from all ranks; checks what every rank gets."""
    steps: dict[int, dict[int, int]] = {}
    options = {
        "world_size": world_size,
        "train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
    } | kwargs
    for rank in range(world_size):
        for micro in take(n, rank=rank, **options):
            assert len(micro) == batch and len({place.step for place in micro}) == 1
            for index, step, position, group, *_ in micro:
                assert group[position] == index and len(group) == world_size * batch * accumulation
                assert position not in steps.setdefault(step, {}), "two ranks share a sample"
                steps[step][position] = index
    for group in steps.values():
        assert sorted(group) == list(range(world_size * batch * accumulation))  # the union of the ranks is the group
        assert len({BUCKET_IDS[index] for index in group.values()}) == 1  # one bucket for all ranks and micro-batches
    return [dict(sorted(group.items())) for group in steps.values()]


def test_ranks_split_one_group():
    """Catches a step that depends on how it is split over processes and micro-batches."""
    whole = steps_of_all_ranks(20, 1, 4, 1)
    groups = islice(sample_groups(BUCKET_IDS, 3, [(4, None)]), 20)
    assert [list(group.values()) for group in whole] == list(groups)
    for world_size, batch, accumulation in ((2, 2, 1), (4, 1, 1), (1, 1, 4), (2, 1, 2), (1, 2, 2)):
        assert steps_of_all_ranks(20, world_size, batch, accumulation) == whole
    assert steps_of_all_ranks(20, 1, 4, 1, seed=4) != whole


def test_a_place_knows_its_epoch():
    """Every sample is dealt for epochs 0, 1, 2, ... in order, whatever batches and leftovers it waited in."""
    segments = [[6, 7, 3], [4, 5, 2]]
    shapes = [index % 2 for index in range(len(BUCKET_IDS))]
    epochs = defaultdict(list)
    for n in range(len(segments)):
        for group in order.step_groups(BUCKET_IDS, 3, segments[: n + 1], shapes):
            for sample, epoch in group:
                epochs[sample].append(epoch)
    sampler = order.MicroBatchSampler(BUCKET_IDS, 2, 1, 0, 1, 3, segments, 12, shapes)
    for place in chain(*islice(sampler, 400)):
        epochs[place.sample].append(place.epoch)
    assert len(epochs) == len(BUCKET_IDS) and max(map(len, epochs.values())) > 3
    assert all(found == list(range(len(found))) for found in epochs.values())


def consumed(segments, n_last, group_size):
    """All samples of the finished segments and of n_last more steps, as one list."""
    finished = [sample_groups(BUCKET_IDS, 3, segments[: number + 1]) for number in range(len(segments))]
    last = islice(sample_groups(BUCKET_IDS, 3, [*segments, (group_size, None)]), n_last)
    return [index for groups in (*finished, last) for group in groups for index in group]


def test_resume_at_any_step_is_the_straight_run():
    """Catches a resume that repeats or skips samples, at whatever step it begins."""
    straight = take(30, train_batch_size=2, gradient_accumulation_steps=2)
    for done in range(30):
        segments = order.advance_segments([], 4, done)
        rest = take(30 - done, train_batch_size=2, gradient_accumulation_steps=2, segments=segments, start_step=done)
        assert rest == straight[done * 2 :]
    twice = order.advance_segments(order.advance_segments([], 4, 7), 4, 5)
    assert twice == [[4, 12]] and json.loads(json.dumps(twice)) == twice
    with pytest.raises(ValueError, match="covers 12 steps, expected 13"):
        take(1, train_batch_size=4, segments=twice, start_step=13)


@pytest.mark.parametrize("sizes", [(4, 2, 8), (8, 2), (2, 6, 3), (5, 5)])
def test_resume_on_another_number_of_processes(sizes):
    """No sample of three epochs is lost or doubled: what has left and what is still pending is the stream."""
    for first in range(0, 9):
        segments: list[list[int]] = []
        for size in sizes[:-1]:
            segments = order.advance_segments(segments, size, first)
        seen = consumed(segments, 40, sizes[-1])
        epochs = -(-len(seen) // len(BUCKET_IDS)) + 1
        for index in range(len(BUCKET_IDS)):
            assert seen.count(index) <= epochs
        stream = [index for index, _ in islice(order._stream(len(BUCKET_IDS), 3), (epochs + 3) * len(BUCKET_IDS))]
        for bucket in set(
            BUCKET_IDS
        ):  # each bucket's samples leave in the order of the stream, none skipped or repeated
            mine = [index for index in seen if BUCKET_IDS[index] == bucket]
            assert mine == [index for index in stream if BUCKET_IDS[index] == bucket][: len(mine)]
        steps = steps_of_all_ranks(5, sizes[-1], 1, 1, segments=segments, start_step=sum(n for _, n in segments))
        continued = islice(sample_groups(BUCKET_IDS, 3, [*segments, (sizes[-1], None)]), 5)
        assert [list(step.values()) for step in steps] == list(continued)


def test_every_sample_is_seen_equally_often():
    """Catches rare buckets that are left out or seen again and again."""
    seen = consumed([], 190, 4)  # 760 samples are 40 epochs
    counts = [seen.count(index) for index in range(len(BUCKET_IDS))]
    assert min(counts) >= 38 and max(counts) <= 41


def test_stream_is_a_function_of_seed_and_epoch():
    """The numbers are fixed: a new NumPy must not change the order of a run that is resumed."""
    assert [index for index, _ in islice(order._stream(6, 0), 12)] == [3, 5, 4, 0, 2, 1, 0, 5, 1, 3, 2, 4]
    with pytest.raises(ValueError, match="zero samples"):
        next(order.step_groups([], 0, [(1, None)]))


class Squares(torch.utils.data.Dataset):
    def __getitem__(self, item):
        return item.sample**2, item.step, item.position, os.getpid()


SHAPE_IDS = [i % 5 for i in range(len(BUCKET_IDS))]  # most rarer than a step


@pytest.mark.parametrize(("world_size", "batch", "accumulation"), [(1, 2, 4), (2, 2, 2), (1, 3, 1), (2, 1, 4)])
def test_a_micro_batch_has_one_shape(world_size, batch, accumulation):
    """Catches micro-batches of mixed shapes, and steps that wait until a rare shape fills them with itself."""
    steps = steps_of_all_ranks(400, world_size, batch, accumulation, shape_ids=SHAPE_IDS)
    size = world_size * batch * accumulation
    seen = Counter()
    for group in steps:
        dealt = [group[position] for position in range(size)]
        for start in range(0, size, batch):
            assert len({SHAPE_IDS[index] for index in dealt[start : start + batch]}) == 1
        seen.update(dealt)
    assert set(seen) == set(range(len(BUCKET_IDS))) and max(seen.values()) - min(seen.values()) <= size
    if accumulation > 1:
        assert sum(len({SHAPE_IDS[index] for index in group.values()}) > 1 for group in steps) > 200


def test_shapes_and_resume():
    """Catches a resumed run that loses or repeats samples that waited for others of their shape."""
    options = {"train_batch_size": 2, "gradient_accumulation_steps": 2, "shape_ids": SHAPE_IDS}
    straight = take(30, **options)
    sampler = order.MicroBatchSampler(BUCKET_IDS, 2, 2, 0, 1, seed=3, shape_ids=SHAPE_IDS)
    segments = sampler.segments_at(11)
    assert segments == [[4, 11, 2]]
    assert take(19, segments=segments, start_step=11, **options) == straight[22:]
    other = {**options, "train_batch_size": 1}  # another batch size: every sample still comes once an epoch
    more = take(200, segments=segments, start_step=11, **other)
    seen = Counter(place.sample for batch in [*straight[:22], *more] for place in batch)
    assert set(seen) == set(range(len(BUCKET_IDS))) and max(seen.values()) - min(seen.values()) <= 4


@pytest.mark.parametrize("workers", [0, 2])
def test_loader(workers):
    """Catches workers that touch the global generator, die of a scheduler's signal, or change the order."""
    before = torch.get_rng_state()
    sampler = order.MicroBatchSampler(BUCKET_IDS, 2, 2, 1, 2, seed=3)
    samples = loader.make_loader(Squares(), sampler, workers, seed=0, collate=list)
    batches = list(islice(samples, 12))
    assert torch.equal(before, torch.get_rng_state())  # the global generator is untouched
    expected = islice(sampler, 12)
    assert [[sample[:3] for sample in batch] for batch in batches] == [
        [(place.sample**2, place.step, place.position) for place in batch] for batch in expected
    ]
    pids = {sample[3] for batch in batches for sample in batch}
    assert len(pids) == max(workers, 1) and (os.getpid() in pids) == (workers == 0)
    for pid in pids if workers else ():  # Ctrl-C and a scheduler's first SIGTERM are left to the trainer
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGTERM)
    time.sleep(0.2)
    more = [sample[3] for batch in islice(samples, 20) for sample in batch]
    assert set(more) == pids


def test_micro_batches():
    """Catches a column of a row that is lost on the way to the loss, unequal shapes that are stacked, and places that
    do not say which samples they are."""
    rows = [
        {"latents": torch.full((4, 2, 3), float(n)), "prompt_embeds": torch.zeros(3 + n, 5), "mask": torch.ones(2, 2)}
        for n in range(2)
    ]
    places = [order.Place(7, 11, n, (7, 8, 9)) for n in (2, 0)]
    batch = loader.collate([{**row, "name": "x", **loader.of_place(p)} for row, p in zip(rows, places)])
    assert batch["latents"].shape == (2, 4, 2, 3) and batch["latents"][1].eq(1).all() and batch["mask"].shape[0] == 2
    assert [embeds.shape for embeds in batch["prompt_embeds"]] == [(3, 5), (4, 5)] and batch["name"] == ["x", "x"]
    assert (batch["step"], batch["group_size"], batch["positions"]) == (11, 3, [2, 0])
    assert loader.collate([{"latents": torch.zeros(3)}]).keys() == {"latents"}  # a held-out row has no place


CRASH = """
import sys
sys.path.insert(0, {root!r})
from common.data import loader, order

class Samples:
    def __getitem__(self, item):
        return 1 // ({where!r} == "main" or item[1] < 2)

batches = loader.make_loader(Samples(), order.MicroBatchSampler([0] * 9, 2, 1, 0, 1, seed=0), 2, seed=0, collate=list)
for _ in range(4):
    next(batches)
raise ZeroDivisionError("in the main process")
"""


@pytest.mark.parametrize("where", ["main", "worker"])
def test_a_crash_ends_the_workers(where):
    """Catches a crash after which the workers keep the process alive for ever."""
    script = CRASH.format(root=str(ROOT), where=where)
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 1 and "ZeroDivisionError" in result.stderr
