"""The command of another document for this model, in the recipe's folder, with nothing changed: accelerate's own
launcher, a launch file and a config by their paths. A test adds what makes the model tiny and the run short."""

import json
import shlex
from pathlib import Path
from unittest import mock

import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml
from accelerate.commands import launch as launcher
from helpers import ROOT, column, locked, run_command
from torch.distributed.run import determine_local_world_size

from common.start.config import parse_recipe

RECIPE = ROOT / "recipes" / Path(__file__).parent.name
COMMAND = "accelerate launch --config_file accelerate/zero3_offload.yaml train.py --config configs/fulltune_5000.yaml"
ACCUMULATION = {"local_debug": 2, "local": 2, "5000": 2, "production": 4}


@pytest.mark.parametrize("name", ACCUMULATION)
def test_values_of_the_configs(train, name):
    """Catches a config that no longer has the values that its name stands for."""
    cfg = parse_recipe(
        train.Config, ["--config", str(RECIPE / f"configs/fulltune_{name}.yaml"), "--train_data_dir", "given"]
    )
    assert (cfg.run.launch, cfg.tuning.optimizer, cfg.precision.mixed_precision) == ("zero3_offload", "adamw", "bf16")
    assert (cfg.optim.learning_rate, cfg.batch.train_batch_size, cfg.batch.global_batch_size) == (5e-6, 1, 0)
    assert cfg.batch.gradient_accumulation_steps == ACCUMULATION[name] and cfg.speed.gradient_checkpointing
    assert (cfg.run.report_to, cfg.run.tracker_project_name) == ("wandb", "QwenImage-20B-FullTune")
    assert name != "5000" or cfg.batch.max_train_steps == 5000
    assert 0 < cfg.validation.validation_steps <= cfg.batch.max_train_steps
    assert 0 < cfg.run.checkpointing_steps <= cfg.batch.max_train_steps


@pytest.mark.parametrize("file", sorted((RECIPE / "accelerate").glob("*.yaml")), ids=lambda file: file.stem)
def test_a_launch_file_alone_says_how_many_processes(file):
    """Catches a launch file that works under run.sh only ("You need to manually pass in `--num_processes`"), and one
    that does not take every GPU that there is."""
    words = ["--config_file", str(file), "train.py", "--config", "configs/full.yaml"]
    args, _, _ = launcher._validate_launch_command(launcher.launch_command_parser().parse_args(words))
    with mock.patch.object(torch.cuda, "is_available", lambda: True), mock.patch("torch.cuda.device_count", lambda: 4):
        processes = determine_local_world_size(str(args.num_processes))
    assert processes == (1 if file.stem == "single" else 4)


@pytest.mark.slow
def test_the_command(recipe, model_folder, data_folder, tmp_path):
    """Catches files that are not found from the recipe's folder, a config whose optimizer or batch the strategy
    refuses, and prompts of a parquet file that nothing draws."""
    prompts = ["a cross", "a blue star at the top"]
    pyarrow.parquet.write_table(pyarrow.table({"prompt": prompts}), tmp_path / "prompts.parquet")
    words = shlex.split(COMMAND)
    words[2:2] = ["--num_processes", 2, "--main_process_port", 0]  # without a GPU one a core, at a port of all runs
    added = {
        "pretrained_model_name_or_path": model_folder,
        "train_data_dir": data_folder,
        "validation_prompts": tmp_path / "prompts.parquet",
        "output_dir": tmp_path / "run",
        "resolution": 64,
        "bucket_multiple": 32,
        "max_train_steps": 2,
        "checkpointing_steps": 0,
        "num_inference_steps": 2,
        "dataloader_num_workers": 0,
    }
    words += [word for name, value in added.items() for word in (f"--{name}", value)]
    with locked("launched_runs", alone=False):
        in_folder = ["bash", "-c", 'cd "$0" && exec "$@"', recipe]
        run_command([*in_folder, *words], DS_SKIP_CUDA_CHECK="1").check()
    losses = column(tmp_path / "run")
    assert losses.keys() == {1, 2} and torch.tensor(list(losses.values())).isfinite().all()
    environment = json.loads((tmp_path / "run/environment.json").read_text())
    assert (environment["launch"], environment["processes"]) == ("zero3_offload", 2)
    settings = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    expected = {"learning_rate": 5e-6, "train_batch_size": 1, "gradient_accumulation_steps": 2}
    assert {name: settings[name] for name in expected} == expected
    drawn = tmp_path / "run/validation_images/step_000002"
    assert [(drawn / f"00{i}.txt").read_text().strip() for i in range(2)] == prompts
    assert (tmp_path / "run/export/transformer/config.json").is_file()
