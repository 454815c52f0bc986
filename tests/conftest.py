"""Set-up of all tests: the repository on the path, one thread, long files first, tests for GPUs skipped without
one."""

import os
import sys
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded: a test that tries fails at once

import pytest
import torch
from data_files import png

torch.set_num_threads(1)  # small shapes gain nothing from more, and stall when the cores are shared


# What takes longest begins first, so that of two files at a time none is left alone at the end. Runs with two
# processes alternate with runs of one.
LONG_FILES = [
    "qwenimage_edit_tiny",
    "qwenimage_strategies",
    "qwenimage_edit_strategies",
    "flux2klein_tiny",
    "qwenimage_tiny",
    "flux2klein_strategies",
    "qwenimage_edit_single",
    "drift",
    "qwenimage21_tiny",
    "kolors_tiny",
    "stops",
    "kolors_strategies",
    "qwen3vl_tiny",
    "qwenimage_edit_overfit",
    "qwen3vl_ddp",
    "launchers",
    "commands",
    "single",
    "overfit",
    "streaming",
]


def place(item: pytest.Item) -> tuple[int, str]:
    """Of an item's file among all: the first of LONG_FILES that its name ends in, then the rest."""
    found = (number for number, name in enumerate(LONG_FILES) if item.path.stem.endswith(f"_{name}"))
    return next(found, len(LONG_FILES)), str(item.path)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=place)
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures, red, green and blue, that data_files.ROWS name."""
    (tmp_path / "train").mkdir()
    for number, colour in enumerate(("red", "green", "blue")):
        (tmp_path / f"train/{number}.png").write_bytes(png(colour))
    return tmp_path


@pytest.fixture
def parquet_cache(tmp_path_factory, monkeypatch) -> ModuleType:
    """The module datasets, with a cache of this test's own."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    datasets.disable_progress_bars()
    return datasets
