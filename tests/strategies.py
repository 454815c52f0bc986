"""What recipes with a transformer prove of every launch file: two processes train, draw and export what one does."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers import column, largest_difference, read_rows
from PIL import Image

HAS_LIBAIO = Path("/usr/include/libaio.h").is_file()
needs_libaio = pytest.mark.skipif(
    not HAS_LIBAIO, reason="libaio's headers are missing (Debian, Ubuntu: apt-get install libaio-dev)"
)
STRATEGIES = ["ddp", "fsdp2", "fsdp2_offload", "zero2", "zero3", "zero3_offload"]


def assert_same_losses(ours: Path, single: Path, launch: str = "") -> None:
    """The same losses, gradient norms and latents as one process, under the launch file that was asked for."""
    assert not launch or json.loads((ours / "environment.json").read_text())["launch"] == launch
    assert largest_difference(column(ours), column(single)) < 1e-4
    assert largest_difference(column(ours, "grad_norm"), column(single, "grad_norm")) < 1e-3
    assert column(ours, "latents_mean") == pytest.approx(column(single, "latents_mean"), abs=1e-6, rel=0)


def assert_same_continuation(resumed: Path, straight: Path, saved: int) -> None:
    """A run that went on from its checkpoint of step `saved` equals the straight one to the last bit."""
    for name in ("loss", "grad_norm", "latents_mean"):
        assert column(resumed, name) == column(straight, name, from_step=saved + 1), name


def assert_same_validation(ours: Path, single: Path, steps: int, pictures: set[str], drawn: set[str]) -> None:
    """The same held-out losses, pictures and texts before the first step and after the last. pictures: that must be
    there; drawn: those of which no pixel may be off by more than 8 of 255."""
    rows, expected = (read_rows(folder / "validation.jsonl") for folder in (ours, single))
    assert [row["step"] for row in rows] == [row["step"] for row in expected] == [0, steps]
    for row, other in zip(rows, expected, strict=True):
        assert row["validation_loss"] == pytest.approx(other["validation_loss"], rel=1e-4)
    for step in (0, steps):
        folders = [folder / f"validation_images/step_{step:06d}" for folder in (ours, single)]
        names = {path.name for path in folders[0].iterdir()}
        assert names == {path.name for path in folders[1].iterdir()} and names >= pictures | drawn, (names, step)
        for name in sorted(name for name in names if name.endswith(".png")):
            a, b = (np.asarray(Image.open(folder / name), dtype=np.float32) for folder in folders)
            assert a.shape == b.shape and np.abs(a - b).mean() < 0.5, (name, step, np.abs(a - b).mean())
            assert name not in drawn or np.abs(a - b).max() <= 8, (name, step, np.abs(a - b).max())
        assert (folders[0] / "001.txt").read_text() == (folders[1] / "001.txt").read_text()


def assert_opens(model: type, folder: Path) -> object:
    """An exported model, read by diffusers without a missing, unexpected or mismatched weight."""
    opened, report = model.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return opened
