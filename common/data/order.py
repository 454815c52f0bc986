"""From checked records to micro-batches: aspect buckets, and the order of samples.

Sizes are PIL's (width, height). The order of samples is a function of the seed and of the steps taken so far, so a run
goes on exactly from any step, also on another number of processes.
"""

import hashlib
import json
import math
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Sequence
from itertools import chain, count, islice
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Sampler

from common.data.manifest import Record

# ---- aspect buckets


ENLARGED = 1.05  # what is scaled by more is worth a notice; less is rounding
USUAL_SIZES = {  # that models are known to draw at a resolution: such pictures stay as they are
    1328: {(1664, 928), (928, 1664), (1584, 1056), (1056, 1584), (1472, 1104), (1104, 1472)},
}


def make_buckets(resolution: int, step: int = 32, max_aspect: float = 2.0) -> list[tuple[int, int]]:
    """(width, height) pairs of about resolution squared pixels, sides multiples of `step`, up to max_aspect : 1."""
    if resolution < step or resolution % step:
        nearest = max(step, round(resolution / step) * step)
        raise ValueError(f"resolution is {resolution}; expected a multiple of {step}, for example {nearest}")
    buckets = {(resolution, resolution)}
    for width in range(resolution + step, int(resolution * max_aspect**0.5) + 2 * step, step):
        height = round(resolution**2 / width / step) * step
        if height and width / height <= max_aspect and 0.8 <= width * height / resolution**2 <= 1.25:
            buckets |= {(width, height), (height, width)}
    usual = {size for size in USUAL_SIZES.get(resolution, ()) if size[0] % step == size[1] % step == 0}
    return sorted(buckets | usual)


def choose_buckets(records: Sequence[Record], resolution: int, multiple: int = 32) -> list[tuple[int, int]]:
    """The (width, height) bucket of each checked record, at its own resolution or at this one."""
    kinds = {(record.resolution or resolution, record.width, record.height) for record in records}
    buckets = {side: make_buckets(side, multiple) for side, _, _ in kinds}
    of_kind = {kind: nearest_bucket(*kind[1:], buckets[kind[0]]) for kind in kinds}
    return [of_kind[record.resolution or resolution, record.width, record.height] for record in records]


def nearest_bucket(width: int, height: int, buckets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The bucket whose log aspect is nearest; of equals the largest that does not enlarge the picture."""

    def distance(size: tuple[int, int]) -> tuple[float, bool, int]:
        return abs(math.log(width / height * size[1] / size[0])), size[0] > width, -size[0] * size[1]

    return min(buckets, key=distance)


def data_digest(records: Sequence[Record], bucket_ids: Sequence[int | tuple[int, int]]) -> str:
    """Names the images, their buckets and their order: what a checkpoint's place in the order of samples refers to.

    Captions are not in it: they may be corrected between two runs. Records as check_records returns them.
    """
    hasher = hashlib.blake2b(digest_size=16)
    for record, bucket in zip(records, bucket_ids, strict=True):
        assert record.digest, "a record has its digest only after check_records"
        hasher.update(json.dumps([record.digest, bucket]).encode())
    return hasher.hexdigest()


# ---- the order of samples


def _stream(n_samples: int, seed: int) -> Iterator[tuple[int, int]]:
    """Epoch after epoch of (sample, epoch). RandomState, because NumPy never changes its numbers (NEP 19)."""
    for epoch in count():
        yield from ((sample, epoch) for sample in np.random.RandomState([seed, epoch]).permutation(n_samples).tolist())


class _Dealer:
    """Deals a stream of (sample, epoch) into groups; what waits stays with it when the group size changes."""

    def __init__(self, bucket_ids: Sequence, shape_ids: Sequence | None, stream: Iterator[tuple[int, int]]) -> None:
        self.bucket_ids, self.shape_ids, self.stream = bucket_ids, shape_ids or bucket_ids, stream
        self.left: deque[tuple[int, int]] = deque()  # to be dealt before the stream goes on
        self.batches: dict[object, list] = defaultdict(list)  # by shape: micro-batches that fill up
        self.ready: dict[object, list] = {bucket: [] for bucket in sorted(set(bucket_ids))}  # full ones

    def groups(self, size: int, batch_size: int) -> Iterator[list[tuple[int, int]]]:
        """Groups of one bucket whose every `batch_size` samples in a row have one shape."""
        waiting = [*chain(*self.ready.values()), *chain(*self.batches.values())]
        self.left.extendleft(reversed(waiting))
        self.batches.clear()
        for bucket in self.ready:
            self.ready[bucket] = []
        while True:
            item = self.left.popleft() if self.left else next(self.stream)
            bucket, shape = self.bucket_ids[item[0]], self.shape_ids[item[0]]
            batch = self.batches[bucket if batch_size == 1 else (bucket, shape)]
            batch.append(item)
            if len(batch) == batch_size:
                self.ready[bucket] += batch
                batch.clear()
            if len(self.ready[bucket]) == size:
                group, self.ready[bucket] = self.ready[bucket], []
                yield group


def step_groups(
    bucket_ids: Sequence,
    seed: int,
    segments: Sequence[Sequence[int | None]],
    shape_ids: Sequence | None = None,
) -> Iterator[list[tuple[int, int]]]:
    """Groups of (sample, epoch it is dealt for, from 0), one an optimizer step, each of one bucket.

    The epochs' permutations, one after the other, are dealt to the buckets; a bucket that holds a whole group lets
    it go, and leftovers wait for the next epoch, so that in the long run every sample is seen equally often. segments:
    [group_size, n_groups] in order; all are replayed, the groups of the last are yielded (n_groups None: endless).
    shape_ids: what samples of one micro-batch must have in common beside their bucket; then a segment is [group_size,
    n_groups, batch_size], and the group's micro-batches lie one after the other.
    """
    if not len(bucket_ids):
        raise ValueError("zero samples; expected at least one row after the check of the data")
    dealer = _Dealer(bucket_ids, shape_ids, _stream(len(bucket_ids), seed))
    for size, n_groups, *batch_size in segments[:-1]:
        deque(islice(dealer.groups(size, *batch_size or [1]), n_groups), maxlen=0)
    size, n_groups, *batch_size = segments[-1]
    yield from islice(dealer.groups(size, *batch_size or [1]), n_groups)


def advance_segments(
    segments: Sequence[Sequence[int]], group_size: int, n_steps: int, batch_size: int = 1
) -> list[list[int]]:
    """The segments after n_steps more steps of group_size: what a checkpoint saves and the next sampler is given."""
    result = [list(segment) for segment in segments]
    kind = [group_size] if batch_size == 1 else [group_size, batch_size]
    if n_steps and result and [result[-1][0], *result[-1][2:]] == kind:
        result[-1][1] += n_steps
    elif n_steps:
        result.append([group_size, n_steps, *kind[1:]])
    return result


def drawn(choices: int, seed: int, epoch: int, sample: int) -> int:
    """Which of so many choices a row has in an epoch."""
    return int(np.random.RandomState([seed, epoch, sample]).randint(choices)) if choices > 1 else 0


class Place(NamedTuple):
    """What the loader asks a dataset for; use the names, fields may be added."""

    sample: int  # index into the data set
    step: int  # optimizer step
    position: int  # within the step's group, from 0
    group: tuple[int, ...] = ()  # samples of the whole step, over all micro-batches and processes
    epoch: int = 0  # passes over the data that came before this one
    seed: int = 0  # of the order

    def draw(self, choices: Sequence) -> Any:
        """One of a row's choices, for instance of its captions."""
        return choices[drawn(len(choices), self.seed, self.epoch, self.sample)]


class MicroBatchSampler(Sampler[list[Place]]):
    """One rank's micro-batches, endless: lists of Place.

    segments: those of the checkpoint, () for a new run; start_step: how many steps they cover, the first to come.
    Micro-batch m of rank r is group[(m * world_size + r) * train_batch_size:][:train_batch_size]. shape_ids: see
    step_groups.
    """

    def __init__(
        self,
        bucket_ids: Sequence[int],
        train_batch_size: int,
        gradient_accumulation_steps: int,
        rank: int,
        world_size: int,
        seed: int,
        segments: Sequence[Sequence[int]] = (),
        start_step: int = 0,
        shape_ids: Sequence | None = None,
    ) -> None:
        assert 0 <= rank < world_size
        covered = sum(segment[1] for segment in segments)
        if covered != start_step:
            raise ValueError(
                f"the order of samples covers {covered} steps, expected {start_step}: a mixed-up checkpoint"
            )
        self.bucket_ids, self.seed, self.segments, self.start_step = bucket_ids, seed, segments, start_step
        self.batch_size, self.accumulation = train_batch_size, gradient_accumulation_steps
        self.rank, self.world_size = rank, world_size
        self.group_size = train_batch_size * gradient_accumulation_steps * world_size
        self.shape_ids, self.equal_shapes = shape_ids, train_batch_size if shape_ids is not None else 1

    def segments_at(self, step: int) -> list[list[int]]:
        """What a checkpoint at `step` saves, and the next sampler is given."""
        return advance_segments(self.segments, self.group_size, step - self.start_step, self.equal_shapes)

    def __iter__(self) -> Iterator[list[Place]]:
        for step, group in self.steps():
            whole = tuple(sample for sample, _ in group)
            for micro in range(self.accumulation):
                first = (micro * self.world_size + self.rank) * self.batch_size
                places = range(first, first + self.batch_size)
                yield [Place(whole[at], step, at, whole, group[at][1], self.seed) for at in places]

    def steps(self) -> Iterator[tuple[int, list[tuple[int, int]]]]:
        """(step, [(sample, epoch), ...]) of all processes, endless: what a run will need, known before it starts."""
        segments = [*self.segments, (self.group_size, None, self.equal_shapes)]
        groups = step_groups(self.bucket_ids, self.seed, segments, self.shape_ids)
        yield from enumerate(groups, start=self.start_step)


def describe_buckets(records: Sequence[Record], buckets: Sequence[tuple[int, int]]) -> str:
    """How many samples each (width, height) bucket has, and how many pictures are too small for theirs."""
    sizes, alike = (
        Counter(buckets),
        Counter((r.width, r.height, *size) for r, size in zip(records, buckets, strict=True)),
    )
    small = sum(n for (*size, width, height), n in alike.items() if max(width / size[0], height / size[1]) > ENLARGED)
    counts = ", ".join(f"{width} x {height}: {number}" for (width, height), number in sorted(sizes.items()))
    enlarged = f"; {small} of {len(buckets)} pictures are smaller than their bucket and are enlarged" if small else ""
    return f"buckets (width x height): {counts}{enlarged}"
