"""Images a second a core, decoded and resized, against a plain Pillow loop: `python tests/bench_data.py` prints it."""

import io
import json
import os
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.data import check, images, loader, manifest, order

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


if __name__ == "__main__":
    for resolution in (1024, 512, 256):
        print(json.dumps(bench(resolution)))
