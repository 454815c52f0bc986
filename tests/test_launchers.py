"""Every recipe started by hand from its own folder, with relative paths, by torchrun and by `accelerate launch`: what
run.sh would do, without it."""

import json
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from helpers import RECIPES, ROOT, make_tiny_base, read_rows, run_command
from sources import settings_of

each_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=[recipe.name for recipe in RECIPES])
LAUNCHERS = {
    "torchrun": "torchrun --nproc_per_node=2 --master_port={port} train.py --config configs/tiny.yaml",
    "accelerate": "accelerate launch --config_file accelerate/ddp.yaml --num_processes 2 --main_process_port {port} "
    "train.py --config configs/tiny.yaml",
}


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def short(tmp_path_factory) -> Callable[[Path], list[object]]:
    """What makes a recipe's run short: two steps; of pictures the first rows alone, encoded once for both."""
    folder = tmp_path_factory.mktemp("short")

    def flags(recipe: Path) -> list[object]:
        words = ["--max_train_steps", 2, "--validation_steps", 0, "--checkpointing_steps", 0, "--train_batch_size", 2]
        if "cache_dir" not in settings_of(recipe):
            return [*words, "--no_evaluate"]
        manifest = next((ROOT / "outputs" / recipe.name / "tiny_base/data").glob("train.json*"))
        text = manifest.read_text()
        rows = json.loads(text) if manifest.suffix == ".json" else [json.loads(line) for line in text.splitlines()]
        (folder / f"{recipe.name}.json").write_text(json.dumps(rows[:16]))
        return [*words, "--train_data_meta", folder / f"{recipe.name}.json", "--cache_dir", folder / recipe.name]

    return flags


# The code between a launcher and the loop is the same everywhere: the first recipe by both, the others in turn.
TURNS = [*zip(RECIPES, [*LAUNCHERS] * len(RECIPES), strict=False), (RECIPES[0], [*LAUNCHERS][1])]


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "launcher"), TURNS, ids=[f"{by}-{recipe.name}" for recipe, by in TURNS])
def test_two_processes_from_the_recipes_folder(recipe, launcher, short, tmp_path):
    """Catches a path that is relative to another folder, a launcher's environment that is not understood, processes
    that train alone, and a recipe's folder accelerate/ or deepspeed/ that hides the package of that name."""
    make_tiny_base(recipe)
    command = LAUNCHERS[launcher].format(port=free_port()).split()
    command += ["--output_dir", tmp_path / "run", *short(recipe)]
    done = run_command(["bash", "-c", 'cd "$0" && exec "$@"', recipe, *command], timeout=300).check()
    assert [row["step"] for row in read_rows(tmp_path / "run")] == [1, 2], done.output
    assert json.loads((tmp_path / "run/environment.json").read_text())["processes"] == 2
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["launch"] == "ddp"


@each_recipe
def test_launch_files_ask_for_no_number_of_processes(recipe):
    """Catches a launch file with which a bare `accelerate launch --config_file ...` ends in "pass --num_processes"."""
    for file in (recipe / "accelerate").glob("*.yaml"):
        content = yaml.safe_load(file.read_text())
        if content["distributed_type"] != "NO":
            assert content.get("num_processes") == "auto", file.name
