"""Commands of other documents for the same job, with the script's path changed and nothing else: data, a pool of
faces, training by `accelerate launch` without a launch file in both directions, evaluation. A test adds only what
makes the model tiny and the run short."""

import importlib
import json
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from helpers import Launched, load_script, read_rows, run_command

from common.start.config import parse_recipe

DATA = "generate_data.py --config face_config.yaml"
POOL = "generate_face_retention_pool.py --num_entities 4"
TRAINING = (
    "--config configs/config_qwen3vl32_fp16.yaml --task {} --name 4faces_qlora --data_dir data/4faces "
    "--face_retention_pool data/face_retention_pool --retention_ratio 0.3"
)
EVALUATION = (
    "evaluate.py --model_path outputs/4faces_qlora_forward/best --base_model {} --data_dir data/4faces --task all "
    "--save_examples 10 --device_map auto"
)
# fp16 is not for a CPU, nor is the optimizer
TINY = "--pretrained_model_name_or_path {} --mixed_precision no --optimizer adamw --max_train_steps 2 "
TINY += "--num_train_epochs 0 --max_validation_rows 4 --dataloader_num_workers 0"
# accelerate starts several processes without being told to where it finds several GPUs
GPUS_FOUND = """
import sys, torch
torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 2
from accelerate.commands import launch
sys.argv[:2] = ["accelerate"]
launch.main()
"""


def run_in(folder: Path, *command: object) -> Launched:
    """A command whose working directory is `folder`."""
    return run_command(["bash", "-c", 'cd "$0" && exec "$@"', folder, *command], timeout=300)


def script(recipe: Path, line: str) -> list[object]:
    name, *flags = line.split()
    return [sys.executable, recipe / name, *flags]


def parsed(train: ModuleType, *words: str):
    return parse_recipe(train.Config, [*words, "--train_data_dir", "given"], train.SECOND_NAMES)


# ---------------------------------------------------------------- settings


@pytest.fixture
def groups(recipe) -> dict:
    """The YAML with groups, as it is."""
    return yaml.safe_load((recipe / "configs/config_qwen3vl32_fp16.yaml").read_text())


@pytest.mark.parametrize("task", ["forward", "reverse"])
def test_flags_and_groups(train, task):
    """Catches a second name that sets something else, a config that is found in one working directory only, and two
    tasks that share a folder."""
    cfg = parse_recipe(train.Config, TRAINING.format(task).split(), train.SECOND_NAMES)
    assert (cfg.task, cfg.retention_ratio, cfg.lora_rank, cfg.lora_alpha, cfg.lora_dropout) == (task, 0.3, 8, 16, 0.05)
    assert cfg.target_modules == ("q_proj", "k_proj", "v_proj", "o_proj")
    assert (cfg.run.output_dir, cfg.data.train_data_dir) == (f"outputs/4faces_qlora_{task}", "data/4faces")
    assert cfg.face_retention_pool == "data/face_retention_pool" and cfg.precision.mixed_precision == "fp16"
    assert (cfg.min_lr, cfg.lr_reduction_factor, cfg.lr_patience, cfg.max_length) == (6e-5, 0.5, 1, 512)
    assert (cfg.improvement_threshold, cfg.min_val_loss, cfg.lr_warmup_ratio) == (0.05, 0.2, 0.02)
    assert (cfg.optim.learning_rate, cfg.optim.adam_weight_decay) == (1e-4, 0.01)
    batch = cfg.batch
    assert (batch.train_batch_size, batch.gradient_accumulation_steps, batch.num_train_epochs) == (1, 8, 10)
    assert "the rate can be reduced never" in importlib.import_module("plateau").plateau_warning(cfg)


def test_the_groups_are_those_of_the_document(groups):
    """Catches a config with groups that was written in this recipe's own names."""
    assert groups["lora"].keys() == {"r", "alpha", "dropout", "target_modules"} and groups["fp16"] is True
    names = "learning_rate min_lr lr_reduction_factor lr_patience improvement_threshold min_val_loss batch_size "
    names += "gradient_accumulation_steps num_epochs max_length warmup_ratio weight_decay"
    assert groups["training"].keys() == set(names.split())


def test_groups_in_other_forms(train, groups, tmp_path):
    """Catches modules that must stand in one order, and fp16 at one place only or only when it is true."""
    groups["lora"]["target_modules"].reverse()
    groups["training"]["fp16"] = groups.pop("fp16")
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(groups))
    cfg = parsed(train, "--config", str(file))
    assert cfg.precision.mixed_precision == "fp16" and cfg.target_modules[0] == "o_proj"
    groups["training"]["fp16"] = False
    file.write_text(yaml.safe_dump(groups))
    assert parsed(train, "--config", str(file)).precision.mixed_precision == "bf16"


@pytest.mark.parametrize("given", [["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj", "o_proj", "qkv"]])
def test_other_modules_are_refused(train, given):
    """Catches modules that are asked for and silently not adapted."""
    with pytest.raises(ValueError, match=r"target_modules must be q_proj k_proj v_proj o_proj.*got q_proj .*leave it"):
        parsed(train, "--target_modules", *given)


def test_a_given_folder_wins_over_the_name(train, tmp_path):
    assert parsed(train, "--name", "x", "--output_dir", str(tmp_path)).run.output_dir == str(tmp_path)
    assert parsed(train).run.output_dir == ""


def test_pools_of_the_working_directory(tmp_path, monkeypatch):
    """Catches a pool that is looked for in the data's folder only, and a path that another working directory loses."""
    rows = importlib.import_module("conversations")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/people/inside").mkdir(parents=True)
    (tmp_path / "data/pool").mkdir()
    assert rows.pool_folder("data/pool", "data/people") == str(tmp_path / "data/pool")
    assert rows.pool_folder("inside", "data/people") == str(tmp_path / "data/people/inside")


def test_names_of_data_folders(recipe, tmp_path, monkeypatch):
    """Catches a folder that is named after other people than it has."""
    generate_data = load_script(recipe / "generate_data.py")
    monkeypatch.chdir(tmp_path)
    small = ["--image_size", "32"]
    generate_data.main(["--num_entities", "5", *small])
    generate_data.main(["--name", "mine", *small])
    assert [len(json.loads((tmp_path / f"data/{name}/entities.json").read_text())) for name in ("5faces", "mine")] == [
        5,
        4,
    ]


# ---------------------------------------------------------------- the commands


@pytest.fixture(scope="module")
def workplace(recipe, model_folder, tmp_path_factory) -> tuple[Path, dict[str, Launched]]:
    """A working directory after all the commands, in their order, and how the trainings ended."""
    folder = tmp_path_factory.mktemp("workplace")
    run_in(folder, *script(recipe, DATA)).check()
    run_in(folder, *script(recipe, POOL)).check()
    trained = {}
    for task in ("forward", "reverse"):
        words = [sys.executable, "-c", GPUS_FOUND, "launch", "--num_processes=2", "--main_process_port=0"]
        words += [recipe / "train.py", *TRAINING.format(task).split(), *TINY.format(model_folder).split()]
        trained[task] = run_in(folder, *words).check()
    short = ["--max_new_tokens", 4, "--no-ablations"]
    run_in(folder, *script(recipe, EVALUATION.format(model_folder)), *short).check()
    return folder, trained


@pytest.mark.slow
def test_the_data(workplace):
    """Catches folders that training does not look into."""
    folder = workplace[0] / "data"
    assert {path.name for path in folder.iterdir()} == {"4faces", "face_retention_pool"}
    assert len(json.loads((folder / "4faces/entities.json").read_text())) == 4
    assert len(read_rows(folder / "face_retention_pool/face_retention_train.jsonl")) == 64


@pytest.mark.slow
@pytest.mark.parametrize("task", ["forward", "reverse"])
def test_the_training(workplace, task):
    """Catches processes that train alone, and a direction that refuses the folder of the other."""
    folder, done = workplace[0] / f"outputs/4faces_qlora_{task}", workplace[1][task]
    assert "2 steps of 16 rows" in done.output and "the rate can be reduced never" in done.output
    rows = read_rows(folder)
    assert [row["step"] for row in rows] == [1, 2] and all(math.isfinite(row["loss"]) for row in rows)
    history = json.loads((folder / "training_history.json").read_text())
    assert history["validations"][-1]["step"] == 2 and history["validations"][-1]["retention_loss"] > 0
    environment = json.loads((folder / "environment.json").read_text())
    assert (environment["launch"], environment["processes"]) == ("ddp", 2)
    for name in ("best", "final"):
        assert (folder / name / "adapter_model.safetensors").is_file()
    cfg = yaml.safe_load((folder / "config.yaml").read_text())
    assert cfg["task"] == task and cfg["face_retention_pool"] == str(workplace[0] / "data/face_retention_pool")


@pytest.mark.slow
def test_the_evaluation(workplace):
    """Catches tasks that are left out."""
    folder = workplace[0] / "outputs/4faces_qlora_forward/evaluation"
    tasks = json.loads((folder / "results.json").read_text())["tasks"]
    assert tasks.keys() == {"forward", "reverse", "choice_description", "choice_image", "face_retention"}
    assert all(task["rows"] > 0 and {"trained", "base"} <= task.keys() for task in tasks.values())
    assert len(read_rows(folder / "examples.jsonl")) == sum(min(10, task["rows"]) for task in tasks.values())
