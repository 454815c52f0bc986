"""common/data/cache.py: an entry is never used for another row or encoder, and a killed pass loses little."""

import dataclasses
import json
import subprocess
import sys
from itertools import islice

import pytest
import torch
from data_files import ROWS, png, write_lines, write_tar
from helpers import ROOT

from common.data import check, loader, manifest, order
from common.data.cache import EmbeddingCache
from common.data.manifest import Record


class Pictures(torch.utils.data.Dataset):
    def __init__(self, records, folder, cache):
        self.records, self.folder, self.cache = records, folder, cache

    def __getitem__(self, item):
        record = self.records[item[0]]
        return manifest.load_image(record, self.folder).getpixel((0, 0)), self.cache[self.cache.key(record)]["latents"]


def test_workers_read_parquet_tar_and_cache(folder, parquet_cache):
    """Catches file handles that cannot go to a worker."""
    parquet_cache.Dataset.from_dict({"image": [png("red")], "text": ["p"]}).to_parquet(folder / "p.parquet")
    write_tar(folder / "t.tar", {"0.png": png("blue"), "0.txt": b"t"})
    records = manifest.load_manifest(folder, "p.parquet") + manifest.load_manifest(folder, "t.tar")
    records = check.check_records(records, folder, progress=False)
    cache = EmbeddingCache(folder / "cache", {})
    for number, record in enumerate(records):
        cache.add(cache.key(record), {"latents": torch.full((2,), float(number))})
    cache.flush()
    sampler = order.MicroBatchSampler([0, 0], 2, 1, 0, 1, seed=0)
    batches = loader.make_loader(Pictures(records, folder, cache), sampler, 2, seed=0, collate=sorted)
    for batch in islice(batches, 4):
        assert [pixel for pixel, _ in batch] == [(0, 0, 255), (255, 0, 0)]
        assert [latents.tolist() for _, latents in batch] == [[1, 1], [0, 0]]


RECORD = Record(0, "a.png", "a cat", digest="d1", width=64, height=64)
FINGERPRINT = {"model": "m", "resolution": 64, "template": "<{}>"}


def filled(folder, fingerprint=FINGERPRINT, record=RECORD, bucket=(64, 64)):
    cache = EmbeddingCache(folder, fingerprint)
    cache.add(cache.key(record, bucket), {"latents": torch.arange(6.0).reshape(2, 3), "length": torch.tensor(5)})
    cache.flush()
    return cache


def test_cache_hit(tmp_path, capsys):
    """Catches an entry encoded again, or returned otherwise than it was put in."""
    filled(tmp_path)
    cache = EmbeddingCache(tmp_path, dict(reversed(FINGERPRINT.items())))
    key = cache.key(RECORD, (64, 64))
    assert key in cache and cache.missing([key, key]) == [] and len(cache) == 1
    entry = cache[key]
    assert entry["latents"].tolist() == [[0, 1, 2], [3, 4, 5]] and entry["length"].item() == 5
    assert "1 entries reused, 0 to encode" in capsys.readouterr().out
    assert json.loads((tmp_path / "fingerprint.json").read_text()) == FINGERPRINT


@pytest.mark.parametrize(
    "change", ["caption", "digest", "bucket", "model", "resolution", "template", "more", "as text"]
)
def test_cache_miss(tmp_path, capsys, change):
    """Catches an entry used for another row, bucket or encoder, and one of no use that nobody hears of."""
    filled(tmp_path)
    capsys.readouterr()
    other = {"caption": {"text": "a dog"}, "digest": {"digest": "d2"}}.get(change, {})
    record = dataclasses.replace(RECORD, **other)
    fingerprint = FINGERPRINT | ({change: "other"} if change in FINGERPRINT else {})
    cache = EmbeddingCache(tmp_path, fingerprint)
    row = record.text if change == "as text" else record
    key = cache.key(row, (96, 32) if change == "bucket" else (64, 64), **({"flip": 1} if change == "more" else {}))
    assert cache.missing([key, key]) == [key] and key not in cache
    with pytest.raises(KeyError):
        cache[key]
    out = capsys.readouterr().out
    assert "0 entries reused, 1 to encode" in out and "does not use 1 entries" in out and f"rm -r {tmp_path}" in out
    assert (f"{change} was {FINGERPRINT.get(change)!r}, is 'other'" in out) == (change in FINGERPRINT)
    assert ("/shard-" in out) == (change in FINGERPRINT)  # shards of other settings can be deleted alone


def test_changed_image_bytes_change_the_key(folder):
    """Catches a picture that was replaced under its name, target or source."""
    (folder / "train.json").write_text(json.dumps([ROWS[0] | {"source_file_path": ["train/1.png"]}]))
    cache, keys = EmbeddingCache(folder / "cache", FINGERPRINT), []
    for path, colour in ((None, ""), ("train/0.png", "lime"), ("train/1.png", "black"), (None, "")):
        if path:
            (folder / path).write_bytes(png(colour))
        (record,) = check.check_records(manifest.load_manifest(folder), folder, progress=False)
        keys.append(cache.key(record, (64, 64)))
    assert len(set(keys)) == 3 and keys[2] == keys[3]


def test_texts_alone(tmp_path):
    """Catches texts without a picture: the empty caption, prompts to draw."""
    cache = EmbeddingCache(tmp_path, FINGERPRINT)
    for text in ("", "a validation prompt"):
        cache.add(cache.key(text), {"prompt_embeds": torch.full((len(text), 4), 1.5, dtype=torch.bfloat16)})
    assert cache[cache.key("")]["prompt_embeds"].shape == (0, 4)  # before the flush
    cache.flush()
    again = EmbeddingCache(tmp_path, FINGERPRINT)
    assert again[again.key("")]["prompt_embeds"].shape == (0, 4)
    assert again[again.key("a validation prompt")]["prompt_embeds"].dtype == torch.bfloat16


def test_ranks_write_their_own_shards(tmp_path, capsys):
    """Catches processes that write over each other, or all talk."""
    records = [Record(i, f"{i}.png", "x", digest=f"d{i}") for i in range(10)]
    caches = [EmbeddingCache(tmp_path, FINGERPRINT, rank=rank, shard_entries=2) for rank in range(2)]
    for rank, cache in enumerate(caches):
        keys = [cache.key(record) for record in records]
        for number in range(rank, 10, 2):
            cache.add(keys[number], {"x": torch.tensor(number)})
        cache.flush()
    caches[0].reload()
    assert [caches[0][key]["x"].item() for key in keys] == list(range(10))
    assert len(list(tmp_path.glob("shard-*"))) == 6
    caches[1].missing(keys)
    assert capsys.readouterr().out == ""  # rank 1 is silent


KILLED = """
import os, sys, torch
sys.path.insert(0, {root!r})
from common.data.cache import EmbeddingCache
cache = EmbeddingCache({folder!r}, {{}}, shard_entries=2)
replace = os.replace
for number in range(6):
    if number == 3:
        os.replace = lambda *_: os.kill(os.getpid(), 9)  # the shard is written, but does not have its name yet
    cache.add(cache.key(str(number)), {{"x": torch.tensor(number)}})
"""


def test_a_kill_loses_one_shard_at_most(tmp_path, capsys):
    """Catches half a shard that is read, or whole ones that are lost with it."""
    script = KILLED.format(root=str(ROOT), folder=str(tmp_path))
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    cache = EmbeddingCache(tmp_path, {})
    keys = [cache.key(str(number)) for number in range(6)]
    assert cache.missing(keys) == keys[2:] and cache[keys[1]]["x"].item() == 1
    out = capsys.readouterr().out
    assert "2 entries reused, 4 to encode" in out and "1 half-written files" in out and "*.tmp" in out


@pytest.mark.parametrize("length", [0, 5, 60, -3])
def test_a_damaged_shard_is_encoded_again(tmp_path, capsys, length):
    """Catches a shard cut short that stops the run or is read."""
    filled(tmp_path)
    (shard,) = tmp_path.glob("shard-*")
    shard.write_bytes(shard.read_bytes()[:length])
    cache = EmbeddingCache(tmp_path, FINGERPRINT)
    assert len(cache.missing([cache.key(RECORD, (64, 64))])) == 1
    assert "cannot be read" in capsys.readouterr().out


def test_several_captions(folder):
    """Catches a list of captions of which one is trained alone, a draw that is not the same after a resume, on another
    process or for another seed, and pictures that come with another row's caption."""
    rows = [ROWS[0] | {"text": ["a", "b", "c"]}, ROWS[1]]
    write_lines(folder / "train.jsonl", rows)
    records = check.check_records(manifest.load_manifest(folder), folder, progress=False)
    assert [(record.text, record.other_texts) for record in records] == [("a", ("b", "c")), ("picture 1", ())]
    embeddings = EmbeddingCache(folder / "cache", {})
    keys = [embeddings.key(record, (32, 32)) for record in records]
    texts = [record.text for record in records]
    numbers = {text: float(number) for number, text in enumerate([*texts, *loader.other_texts(records)])}
    for key, text in zip(keys, texts, strict=True):
        embeddings.add(key, {"latents": torch.full((1,), 9.0), "prompt_embeds": torch.tensor([numbers[text]])})
    for text in loader.other_texts(records):
        embeddings.add(embeddings.key(text), {"prompt_embeds": torch.tensor([numbers[text]])})
    samples = loader.CachedSamples(embeddings, keys, records)

    def seen(seed: int, **at) -> list[tuple[int, int, float]]:
        """(epoch, row, its caption's number) of twelve epochs."""
        sampler = order.MicroBatchSampler([0, 0], 1, 1, at.get("rank", 0), at.get("world_size", 1), seed)
        places = [place for (place,) in islice(sampler, 24 // sampler.world_size)]
        return sorted((place.epoch, place.sample, samples[place]["prompt_embeds"].item()) for place in places)

    first = seen(1)
    assert {number for _, row, number in first if row == 0} == {numbers["a"], numbers["b"], numbers["c"]}
    assert {number for _, row, number in first if row == 1} == {numbers["picture 1"]}
    assert first == seen(1) == sorted([*seen(1, rank=0, world_size=2), *seen(1, rank=1, world_size=2)])
    assert first != seen(2)
    assert all(samples[order.Place(row, 0, 0)]["latents"].item() == 9 for row in (0, 1))
