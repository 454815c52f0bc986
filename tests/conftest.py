"""Set-up of all tests: the repository on the path, one thread, tests for GPUs skipped without one."""

import os
import sys
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded: a test that tries fails at once

import pytest
import torch
from data_files import png

torch.set_num_threads(1)  # small shapes gain nothing from more, and stall when the cores are shared


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
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
