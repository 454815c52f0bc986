"""What people bring, through whole runs: several data sets, captions and resolutions of a row, masks."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from helpers import NamedRuns, column, read_rows
from PIL import Image

from common.record import report, report_parts

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def listed(data_folder, tmp_path_factory) -> Path:
    """sets.yaml: squares three times, at two resolutions, with two captions each; wide pictures once, with a prefix.
    Each picture has a white mask."""
    folder = tmp_path_factory.mktemp("sets")
    rows = json.loads((data_folder / "train.json").read_text())
    for name, chosen in (("squares", rows[2::5][:4]), ("wide", rows[0::5] + rows[1::5])):
        (folder / name).mkdir()
        for row in chosen:
            shutil.copy(data_folder / row["file_path"], folder / name)
            with Image.open(data_folder / row["file_path"]) as image:
                Image.new("L", image.size, "white").save(folder / name / f"mask_{row['file_path']}")
        lines = [row | {"mask": f"mask_{row['file_path']}"} for row in chosen]
        lines = (
            [row | {"text": [row["text"], f"{row['text']}, again"]} for row in lines] if name == "squares" else lines
        )
        (folder / name / "train.json").write_text(json.dumps(lines))
    sets = [
        {"train_data_dir": "squares", "repeats": 3, "resolution": [96, 64]},
        {"train_data_dir": "wide", "caption_prefix": "a drawing of "},
    ]
    (folder / "sets.yaml").write_text(yaml.safe_dump(sets))
    return folder / "sets.yaml"


@pytest.fixture(scope="module")
def runs(train, recipe, config, listed, tmp_path_factory) -> NamedRuns:
    flags = ["--train_data_dir", listed, "--train_batch_size", 4, "--max_train_steps", 4, "--checkpointing_steps", 2]
    flags += ["--validation_steps", 4, "--validation_prompts", "a red cross", "--num_validation_samples", 2]
    return NamedRuns(train, recipe, config, tmp_path_factory.mktemp("runs"), flags)


def test_data_sets_are_counted(runs):
    """Catches rows of a set that are counted more or less often than they are trained on, in what is recorded and
    shown."""
    out = runs.single("plain")
    rows = json.loads((out / "environment.json").read_text())["rows"]
    squares, wide = rows["1. squares"], rows["2. wide"]
    assert squares % 6 == 0 and squares // 6 + wide + rows["held_out"] == 20 and rows["train"] == squares + wide
    assert rows["held_out"] == 2 and rows["buckets"]["64 x 64"] == rows["buckets"]["96 x 96"] == squares // 2
    assert "1. squares" in report.data(report_parts.read_run(out))


def test_a_resume_is_exact(runs):
    """Catches sets, captions or resolutions that are drawn anew after a resume."""
    straight = runs.single("plain")
    resumed = runs.single("resumed", "--resume_from_checkpoint", straight / "checkpoint-2")
    assert column(resumed) == column(straight, from_step=3) and len(set(column(straight).values())) == 4


def test_processes_share_a_step(runs):
    """Catches captions, resolutions or masks that depend on the process."""
    alone, two = runs.single("plain"), runs.launched("two", "ddp", "--train_batch_size", 2)
    assert column(two) == pytest.approx(column(alone), rel=1e-5)


def held_out(out: Path) -> list[float]:
    return [row["validation_loss"] for row in read_rows(out / "validation.jsonl")]


def test_a_mask_weights_the_loss(runs, listed, capfd):
    """Catches a mask that is not checked, not part of the cache's keys, or lost on the way to the loss, in training or
    on held-out rows. White masks change nothing, black ones leave no error, half ones a part."""
    plain, masked = runs.single("plain"), ("--mask_column", "mask")
    white = runs.single("white", *masked)
    assert column(white) == pytest.approx(column(plain), rel=1e-6)
    assert held_out(white) == pytest.approx(held_out(plain), rel=1e-6) and len(held_out(white)) == 2
    for file in listed.parent.glob("*/mask_*.png"):
        with Image.open(file) as mask:
            half = mask.convert("RGB")
        half.paste("black", (0, 0, half.width // 2, half.height))
        half.save(file)
    capfd.readouterr()
    half = runs.single("half", *masked, "--validation_steps", 0, "--max_train_steps", 2)
    assert int(re.search(r" (\d+) to encode", capfd.readouterr().out)[1]) >= 20, "other masks are other rows"
    assert all(0.1 * column(plain)[step] < loss < 0.9 * column(plain)[step] for step, loss in column(half).items())
    for file in listed.parent.glob("*/mask_*.png"):
        with Image.open(file) as mask:
            Image.new("L", mask.size, "black").save(file)
    black = runs.single("black", *masked)
    assert set(column(black).values()) == {0.0} and set(held_out(black)) == {0.0}
    sorted((listed.parent / "wide").glob("mask_*.png"))[0].unlink()
    with pytest.raises(ValueError, match=r"(?s)1 of 20 rows are bad.*2. wide: train.json row 0: .*: mask: missing"):
        runs.single("missing", *masked)
