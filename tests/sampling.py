"""sample.py of the recipes with a transformer against the unmodified pipeline around the same weights."""

import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from helpers import load_script
from PIL import Image


def sample(recipe: Path, folder: Path, *flags: object) -> dict[str, Image.Image]:
    """{name: picture} of what sample.py writes, as the command `python sample.py ...` on a CPU."""
    folder.mkdir(exist_ok=True)
    argv = ["sample.py", *map(str, flags), "--output", str(folder / "drawn.png")]
    with mock.patch.object(sys, "argv", argv), mock.patch.object(torch.cuda, "is_available", lambda: False):
        load_script(recipe / "sample.py").main()
    return {path.name: Image.open(path) for path in sorted(folder.iterdir())}


def assert_same_picture(ours: Image.Image, theirs: Image.Image) -> None:
    """But for a level of 255 here and there."""
    a, b = (np.asarray(image.convert("RGB"), dtype=np.int16) for image in (ours, theirs))
    assert a.shape == b.shape and np.abs(a - b).max() <= 2, np.abs(a - b).max() if a.shape == b.shape else a.shape


def differ(ours: Image.Image, theirs: Image.Image) -> bool:
    return np.asarray(ours.convert("RGB")).tobytes() != np.asarray(theirs.convert("RGB")).tobytes()
