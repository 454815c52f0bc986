"""Images a second a core, decoded and resized, against a plain Pillow loop: `python tests/bench_data.py`.

With a number of rows (`python tests/bench_data.py 1000000`): seconds and memory from the manifest to the first
micro-batch, of so many rows that the cache of encodings knows, the first time and again.
"""

import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.data import cache, check, images, json_rows, loader, manifest, order

SIZES = ((1280, 960), (1024, 1024), (1000, 1500), (1600, 1200))  # 1 to 2 megapixels


def draw_images(folder: Path, n: int) -> None:
    random = np.random.RandomState(0)
    rows = []
    for number in range(n):
        width, height = SIZES[number % len(SIZES)]
        small = random.randint(0, 255, (height // 8, width // 8, 3), dtype=np.uint8)
        image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
        for _ in range(20):
            x, y, size = (int(random.randint(0, limit)) for limit in (width, height, 300))
            ImageDraw.Draw(image).ellipse((x, y, x + size, y + size), fill=tuple(random.randint(0, 255, 3).tolist()))
        image.save(folder / f"{number}.jpg", quality=90)
        rows.append({"file_path": f"{number}.jpg", "text": "drawn"})
    (folder / "train.json").write_text(json.dumps(rows))


def plain(path: Path, size: tuple[int, int]) -> torch.Tensor:
    image = Image.open(io.BytesIO(path.read_bytes())).convert("RGB").resize(size, Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


class Images(torch.utils.data.Dataset):
    """What a recipe's dataset does for one sample."""

    def __init__(self, folder: Path, records: list[manifest.Record], sizes: list[tuple[int, int]]) -> None:
        self.folder, self.records, self.sizes = folder, records, sizes

    def __getitem__(self, item: tuple[int, int, int]) -> torch.Tensor:
        size = self.sizes[item[0]]
        image = manifest.load_image(self.records[item[0]], self.folder, at_least=size)
        return images.image_to_tensor(images.resize_and_crop(image, size))


def bench(resolution: int = 1024, n: int = 24, rounds: int = 5) -> dict:
    torch.set_num_threads(1)  # a core
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        draw_images(folder, n)
        records = check.check_records(manifest.load_manifest(folder), folder, progress=False)
        sizes = order.choose_buckets(records, resolution)
        sampler = order.MicroBatchSampler(sizes, 1, 1, 0, 1, seed=0)
        pictures = loader.make_loader(
            Images(folder, records, sizes), sampler, 0, seed=0, collate=lambda batch: batch[0]
        )
        seconds = {"plain": [], "ours": []}
        for _ in range(rounds):  # in turns, since other work on the machine disturbs both alike
            start = time.perf_counter()
            for record, size in zip(records, sizes, strict=True):
                plain(folder / record.file_path, size)
            middle = time.perf_counter()
            for _ in islice(pictures, n):  # one epoch
                pass
            seconds["plain"].append(middle - start)
            seconds["ours"].append(time.perf_counter() - middle)
    rates = {name: n / min(times) for name, times in seconds.items()}
    ratios = sorted(plain / ours for plain, ours in zip(seconds["plain"], seconds["ours"], strict=True))
    return {
        "resolution": resolution,
        "plain_images_per_second_per_core": round(rates["plain"], 2),
        "images_per_second_per_core": round(rates["ours"], 2),
        "ratio": round(rates["ours"] / rates["plain"], 3),
        "median_ratio_of_rounds": round(ratios[len(ratios) // 2], 3),
    }


# ---- many rows


def make_rows(folder: Path, n: int) -> None:
    """n rows, and as many names of 100 small pictures."""
    source = folder / "source"
    source.mkdir()
    for number in range(100):
        Image.effect_noise(SIZES[number % len(SIZES)], number + 1).resize((64, 48 + number % 32)).save(
            source / f"{number}.jpg"
        )
    with open(folder / "train.jsonl", "w") as file:
        for number in range(n):
            name = Path("images", f"{number % 1000:03d}", f"{number:07d}.jpg")
            if number < 1000:
                (folder / name).parent.mkdir(parents=True)
            os.link(source / f"{number % 100}.jpg", folder / name)
            file.write(json.dumps({"file_path": str(name), "text": f"a drawn picture, number {number}"}) + "\n")


def fill_cache(folder: Path) -> None:
    """Encodings of all rows: one number each."""
    embeddings = cache.EmbeddingCache(folder / "cache", {"model": "none"})
    time.sleep(2)  # younger files are not trusted
    known = embeddings.known_good()
    records = check.check_records(manifest.load_manifest(folder), folder, known_good=known, progress=False)
    for row, bucket in zip(records, order.choose_buckets(records, 1024, 16), strict=True):
        embeddings.add(embeddings.key(row, bucket), {"latents": torch.zeros(1), "prompt_embeds": torch.zeros(1)})
    embeddings.flush()


def start(folder: Path) -> None:
    """What a recipe does before its first step, without the model; prints seconds by stage, and the memory at most."""
    seconds, before = {}, time.perf_counter()
    first = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def done(stage: str) -> None:
        nonlocal before
        seconds[stage], before = round(time.perf_counter() - before, 1), time.perf_counter()

    embeddings = cache.EmbeddingCache(folder / "cache", {"model": "none"})
    done("open the cache")
    with json_rows.many_objects():
        records = manifest.load_manifest(folder)
        done("read the manifest")
        records = check.check_records(records, folder, known_good=embeddings.known_good(), progress=False)
        train, held_out = check.hold_out(records, 8, 0)
        done("check")
    rows = train + held_out
    buckets = order.choose_buckets(rows, 1024, 16)
    done("buckets")
    keys = [embeddings.key(row, bucket) for row, bucket in zip(rows, buckets, strict=True)]
    assert embeddings.missing(keys) == []
    done("look up")
    order.data_digest(rows, buckets)
    sampler = order.MicroBatchSampler(buckets, 4, 1, 0, 1, seed=0)
    next(loader.make_loader(loader.CachedSamples(embeddings, keys), sampler, 0, seed=0))
    done("first micro-batch")
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - first) / 2**10
    print(json.dumps({"rows": len(records), "seconds": seconds, "all": sum(seconds.values()), "MiB": round(memory)}))


def bench_start(n: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        make_rows(Path(name), n)
        for function in ("fill_cache", "start", "start"):  # each in a process of its own, for its memory
            code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import bench_data; from pathlib "
            code += f"import Path; bench_data.{function}(Path({name!r}))"
            subprocess.run([sys.executable, "-c", code], check=True)


if __name__ == "__main__":
    for number in sys.argv[1:]:
        bench_start(int(number))
    for resolution in () if sys.argv[1:] else (1024, 512, 256):
        print(json.dumps(bench(resolution)))
