"""What stands in for the commands of another document: one script for DeepSpeed, one for FSDP, and a first run that
draws every 100 steps."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from helpers import ROOT, column, locked, run_command

from common.start.config import parse_recipe

RECIPE = ROOT / "recipes" / Path(__file__).parent.name


def test_the_first_run_draws_every_100_steps(train):
    """Catches a debug config that no longer shows early what a run does."""
    cfg = parse_recipe(train.Config, ["--config", str(RECIPE / "configs/debug.yaml"), "--train_data_dir", "given"])
    assert (cfg.validation.validation_steps, cfg.batch.max_train_steps) == (100, 1000)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero3", "fsdp2"])
def test_deepspeed_and_fsdp(recipe, model_folder, data_folder, tmp_path, strategy):
    """Catches a config `full` that one of the two strategies refuses, and pictures in another folder than the
    README's."""
    added = {
        "pretrained_model_name_or_path": model_folder,
        "train_data_dir": data_folder,
        "output_dir": tmp_path / "run",
        "resolution": 64,
        "bucket_multiple": 32,
        "max_sequence_length": 32,
        "max_train_steps": 2,
        "checkpointing_steps": 0,
        "num_inference_steps": 2,
        "dataloader_num_workers": 0,
    }
    words = [word for name, value in added.items() for word in (f"--{name}", value)]
    with locked("launched_runs", alone=False):
        run_command(["bash", recipe / "run.sh", "full", *words], LAUNCH=strategy, NPROC="2").check()
    losses = column(tmp_path / "run")
    assert losses.keys() == {1, 2} and torch.tensor(list(losses.values())).isfinite().all()
    assert json.loads((tmp_path / "run/environment.json").read_text())["launch"] == strategy
    settings = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    expected = {"optimizer": "adamw", "train_batch_size": 2, "gradient_accumulation_steps": 2, "global_batch_size": 8}
    assert {name: settings[name] for name in expected} == expected
    assert {p.name for p in (tmp_path / "run/validation_images").iterdir()} == {"step_000000", "step_000002"}
    assert (tmp_path / "run/export/transformer/config.json").is_file()
