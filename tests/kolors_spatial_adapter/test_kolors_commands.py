"""Commands of other documents for the same job with nothing but the script's path changed: labelling, and training on
what it wrote, by python, torchrun and the deepspeed launcher. Tests add what makes model and run small."""

import json
import shlex
import socket
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers import ROOT, Launched, load_script, read_rows, run_command

from common.start.config import parse_recipe

RECIPE = ROOT / "recipes" / Path(__file__).parent.name
LABELLING = (
    "--input-tsv data/wukong_train.tsv --image-dir {images} --output-jsonl data/layout_dataset.jsonl --num-gpus 3 "
    "--batch-size 8 --model-path {model}"
)
TRAINING = "--dataset layout --batch-size 1 --grad-accumulation-steps {} --precision bf16 --lr 1e-4 --epochs 10"
OLD_DEEPSPEED_FILE = {
    "train_batch_size": 24,
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 8,
    "gradient_clipping": 0.3,
    "optimizer": {"type": "AdamW", "params": {"lr": 3e-4}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 100}},
    "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}, "overlap_comm": True},
    "bf16": {"enabled": True},
    "fp16": {"enabled": False},
    "zero_allow_untested_optimizer": True,
}
DRIVER = """
import json, sys
sys.path.insert(0, {recipe!r})
import label_layouts

def scripted(args):
    answers = json.load(open({answers!r}))
    return lambda pictures, prompts: [answers[prompt.split("caption of this picture is: ")[1].split("\\n")[0]]
                                      for prompt in prompts]

if __name__ == "__main__":
    label_layouts.label(label_layouts.parse_arguments(), scripted)
"""


def run_in(folder: Path, *command: object) -> Launched:
    """A command whose working directory is `folder`."""
    return run_command(["bash", "-c", 'cd "$0" && exec "$@"', folder, *command], timeout=150)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def workplace(data_folder, tmp_path_factory) -> Path:
    """A working directory after the labelling command; its pictures lie elsewhere."""
    folder = tmp_path_factory.mktemp("workplace")
    (folder / "data").mkdir()
    rows = [json.loads(line) for line in (data_folder / "train.jsonl").read_text().splitlines()]
    (folder / "data/wukong_train.tsv").write_text("".join(f"{row['file_path']}\t{row['text']}\n" for row in rows))
    for row in rows:
        for item in row["objects"]:
            item["bbox"] = [round(value * 1000) for value in item["bbox"]]
    (folder / "answers.json").write_text(json.dumps({row["text"]: json.dumps(row["objects"]) for row in rows}))
    (folder / "driver.py").write_text(DRIVER.format(recipe=str(RECIPE), answers=str(folder / "answers.json")))
    words = shlex.split(LABELLING.format(images=data_folder, model="Qwen/Qwen2-VL-7B-Instruct"))
    run_in(folder, sys.executable, "driver.py", *words).check()
    return folder


@pytest.fixture
def short(config, tmp_path) -> list[object]:
    """What a test adds to a command."""
    return ["--config", config, "--output_dir", tmp_path / "run", "--max_train_steps", 1]


def check_run(folder: Path, data_folder: Path, samples: int, launch: str, **settings: object) -> None:
    (row,) = read_rows(folder)
    assert row["step"] == 1 and torch.isfinite(torch.tensor(row["loss"]))
    cfg = yaml.safe_load((folder / "config.yaml").read_text())
    processes = json.loads((folder / "environment.json").read_text())["processes"]
    assert cfg["train_batch_size"] * cfg["gradient_accumulation_steps"] * processes == samples
    assert cfg["train_data_dir"] == str(data_folder)
    expected = {"launch": launch, "mixed_precision": "bf16", "learning_rate": 1e-4, **settings}
    assert {name: cfg[name] for name in expected} == expected
    assert (folder / "export/adapter/adapter_model.safetensors").is_file()


# ---------------------------------------------------------------- labelling


def test_flags_of_labelling(tmp_path, monkeypatch):
    """Catches a flag that is known in one spelling only, and results that go elsewhere."""
    labels = load_script(RECIPE / "label_layouts.py")
    (tmp_path / "data").mkdir()
    (tmp_path / "images").mkdir()
    (tmp_path / "data/wukong_train.tsv").write_text("1.png\ta cat\n")
    monkeypatch.chdir(tmp_path)
    line = LABELLING.format(images=tmp_path / "images", model="Qwen/Qwen2-VL-7B-Instruct")
    dashes = labels.parse_arguments(line.split())
    underscores = [f"--{word[2:].replace('-', '_')}" if word.startswith("--") else word for word in line.split()]
    assert dashes == labels.parse_arguments(underscores)
    assert (dashes.num_actors, dashes.batch_size, dashes.model) == (3, 8, "Qwen/Qwen2-VL-7B-Instruct")
    assert dashes.output_jsonl == tmp_path / "data/layout_dataset.jsonl"
    assert dashes.labelling == tmp_path / "data/layout_dataset_labelling"
    usual = labels.parse_arguments(["--input=data/wukong_train.tsv", "--train-data-dir=images"])
    assert (usual.output_jsonl, usual.labelling) == (tmp_path / "images/train.jsonl", tmp_path / "images/labelling")
    with pytest.raises(ValueError, match=r"ends in \.jsonl"):
        labels.parse_arguments([*line.split(), "--output_jsonl", "x.json"])


@pytest.mark.slow
def test_what_labelling_wrote(workplace, data_folder):
    """Catches results beside the pictures instead of where they were asked for, and a folder that is not recorded."""
    assert json.loads((workplace / "data/layout_dataset.meta.json").read_text()) == {
        "train_data_dir": str(data_folder)
    }
    names = {file.name for file in (workplace / "data/layout_dataset_labelling").iterdir()}
    assert names == {"rejected.jsonl", "report.json", "sheet.png"}
    assert not (data_folder / "labelling").exists()
    rows = [json.loads(line) for line in (workplace / "data/layout_dataset.jsonl").read_text().splitlines()]
    assert len(rows) == 40 and all(row["objects"] for row in rows)


def test_rows_of_two_folders_do_not_mix(tmp_path):
    """Catches rows that name pictures of another folder than the one recorded."""
    labels = load_script(RECIPE / "label_layouts.py")
    (tmp_path / "rows.tsv").write_text("1.png\ta cat\n")
    for name in "ab":
        (tmp_path / name).mkdir()
        words = [
            "--input",
            tmp_path / "rows.tsv",
            "--image_dir",
            tmp_path / name,
            "--output_jsonl",
            tmp_path / "x.jsonl",
        ]
        args = labels.parse_arguments([str(word) for word in words])
        if name == "a":
            labels.record_folder(args)
    with pytest.raises(ValueError, match=r"have their pictures in .*/a, got .*/b; use another --output_jsonl"):
        labels.record_folder(args)


# ---------------------------------------------------------------- training


def test_flags_of_training(train, tmp_path, capsys):
    """Catches a second name that sets something else, and a notice that is missing."""
    words = [*TRAINING.format(3).split(), "--multiprocessing-distributed"]
    cfg = parse_recipe(train.Config, words, train.SECOND_NAMES, train.SKIPPED)
    assert (cfg.data.train_data_dir, cfg.precision.mixed_precision, cfg.optim.learning_rate) == (
        "layout",
        "bf16",
        1e-4,
    )
    batch = cfg.batch
    assert (batch.train_batch_size, batch.gradient_accumulation_steps, batch.num_train_epochs) == (1, 3, 10)
    assert "--multiprocessing_distributed is skipped: torchrun" in capsys.readouterr().err


def test_the_labelled_data_is_that_of_the_working_directory(layouts, tmp_path, monkeypatch):
    """Catches another folder that is taken for labelled data, and a message that does not say what to run."""
    from common import settings

    monkeypatch.chdir(tmp_path)
    data = settings.Data(train_data_dir="layout")
    with pytest.raises(ValueError, match=r"run label_layouts.py with --output_jsonl data/layout_dataset\.jsonl in"):
        layouts.find_labelled(data)
    (tmp_path / "data").mkdir()
    for name in ("layout_dataset", "other"):
        (tmp_path / f"data/{name}.jsonl").write_text("{}\n")
        (tmp_path / f"data/{name}.meta.json").write_text(json.dumps({"train_data_dir": f"/{name}"}))
    layouts.find_labelled(data)
    assert (data.train_data_dir, data.train_data_meta) == (
        "/layout_dataset",
        str(tmp_path / "data/layout_dataset.jsonl"),
    )
    data = settings.Data(train_data_dir="layout", train_data_meta="data/other.jsonl")
    layouts.find_labelled(data)
    assert (data.train_data_dir, data.train_data_meta) == ("/other", str(tmp_path / "data/other.jsonl"))
    data = settings.Data(train_data_dir="mine")
    layouts.find_labelled(data)
    assert data == settings.Data(train_data_dir="mine")


@pytest.mark.slow
def test_one_card(workplace, data_folder, short, tmp_path):
    """Catches a labelled file that training refuses."""
    run_in(workplace, sys.executable, RECIPE / "train.py", *TRAINING.format(8).split(), *short).check()
    check_run(tmp_path / "run", data_folder, 8, "single", gradient_accumulation_steps=8)


@pytest.mark.slow
def test_torchrun(workplace, data_folder, short, tmp_path):
    """Catches processes of torchrun that train alone."""
    words = [
        "torchrun",
        "--nproc_per_node=2",
        f"--master_port={free_port()}",
        RECIPE / "train.py",
        *TRAINING.format(3).split(),
    ]
    run_in(workplace, *words, "--multiprocessing-distributed", *short).check()
    check_run(tmp_path / "run", data_folder, 6, "ddp", gradient_accumulation_steps=3)


@pytest.mark.slow
@pytest.mark.parametrize("whose", ["recipe's", "user's"])
def test_deepspeed(workplace, data_folder, short, tmp_path, whose):
    """Catches the launcher's own flags that the parser refuses, a file that is not found, and numbers, an optimizer or
    a schedule in it that win over the settings."""
    file = workplace / "ds_config.json"
    if whose == "user's":
        file.write_text(json.dumps(OLD_DEEPSPEED_FILE))
    try:
        words = ["deepspeed", "--num_gpus=2", f"--master_port={free_port()}", RECIPE / "train.py", "--deepspeed"]
        words += ["--deepspeed_config", file.name, *TRAINING.format(1).replace("batch-size 1", "batch-size 2").split()]
        done = run_in(workplace, *words, *short).check()
    finally:
        file.unlink(missing_ok=True)
    check_run(tmp_path / "run", data_folder, 4, "zero2_offload", train_batch_size=2)
    assert ("section optimizer is skipped" in done.output) == (whose == "user's")
