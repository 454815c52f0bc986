"""Rows a second of the encoding stage, one by one and in batches with pictures read ahead, of qwenimage_fulltune:
`python tests/bench_encode.py [MODEL_FOLDER] [--rows 64] [--resolution 1024] [--batches 1 4 8]`.

Without a model folder the tiny model's. The pictures are drawn, of 1 to 2 megapixels. One by one means: a picture is
read, encoded and kept before the next is read.
"""

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path

import torch
from bench_data import draw_images
from helpers import ROOT, load_script

from common.data import cache, check, encoding, manifest, order
from common.image_settings import Pictures
from common.start.config import parse_recipe

RECIPE = ROOT / "recipes/qwenimage_fulltune"


class Here:
    """One process."""

    rank, world_size = 0, 1

    def __init__(self) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def share_of(self, items: list) -> list:
        return items

    def progress(self, items: object, title: str, total: int) -> object:
        return items


def one_by_one(run: Here, embeddings: cache.EmbeddingCache, items: dict, encoders: encoding.Encoders) -> None:
    for key, item in items.items():
        (entry,) = encoding.encode_batch(encoders, [item], [encoders.read(item)])
        embeddings.add(key, entry)


def seconds(run: Here, folder: Path, items: dict, encoders: encoding.Encoders, batch_size: int) -> float:
    """Of encoding all items and writing them; batch_size 0 is one by one."""
    shutil.rmtree(folder, ignore_errors=True)
    embeddings, start = cache.EmbeddingCache(folder, {}), time.perf_counter()
    if batch_size:
        encoding.encode_items(run, embeddings, items, encoders, Pictures(encode_batch_size=batch_size))
    else:
        one_by_one(run, embeddings, items, encoders)
    embeddings.flush()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--resolution", type=int, default=1024)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    train, run = load_script(RECIPE / "train.py"), Here()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if given.model is None:
            load_script(RECIPE / "make_tiny.py").make(folder / "tiny")
        (folder / "data").mkdir()
        draw_images(folder / "data", given.rows)
        rows = check.check_records(manifest.load_manifest(folder / "data"), folder / "data", progress=False)
        items = {str(n): item for n, item in enumerate(zip(rows, order.choose_buckets(rows, given.resolution, 16)))}
        cfg = parse_recipe(train.Config, ["--train_data_dir", str(folder / "data")])
        dtype = torch.bfloat16 if run.device.type == "cuda" else torch.float32
        encoders = train.Encoders(cfg, given.model or folder / "tiny/model", run.device, dtype)
        seconds(run, folder / "cache", dict(list(items.items())[:8]), encoders, 0)  # what is done once
        rates: dict[str, list[float]] = {}
        for _ in range(given.rounds):  # in turns, since other work on the machine disturbs all alike
            for batch_size in (0, *given.batches):
                rate = given.rows / seconds(run, folder / "cache", items, encoders, batch_size)
                rates.setdefault(f"in batches of {batch_size}" if batch_size else "one by one", []).append(rate)
    best = {name: round(max(each), 2) for name, each in rates.items()}
    print(json.dumps({"resolution": given.resolution, "device": str(run.device), "rows a second": best}))


if __name__ == "__main__":
    main()
