"""common/config.py: YAML and flags through one parser; what the user reads when something is wrong."""

import dataclasses
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from helpers import ROOT

from common.config import config_table, field_helps, parse_config, save_config, yaml_to_flags


@dataclass
class Config:
    """An example."""

    learning_rate: float = 1e-4
    """peak learning rate"""
    max_train_steps: int = 10
    """optimizer
    steps"""
    num_train_epochs: int = 0
    """passes over the data"""
    enable_bucket: bool = False
    """sort by aspect"""
    shuffle: bool = True
    """shuffle"""
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    """which"""
    prompts: tuple[str, ...] = ()
    """what to draw"""
    resume: str | None = None
    """a path, or "latest" """

    def __post_init__(self) -> None:
        if self.max_train_steps < 1:
            raise ValueError(f"max_train_steps must be at least 1, got {self.max_train_steps}")


@pytest.fixture
def yaml_file(tmp_path):
    def write(text: str) -> list[str]:
        (tmp_path / "given.yaml").write_text(text)
        return ["--config", str(tmp_path / "given.yaml")]

    return write


def test_yaml_then_flags_last_wins(yaml_file, tmp_path):
    """Catches a YAML that overrides the command line, in either order of the words."""
    config = yaml_file("learning_rate: 0.5\nmax_train_steps: 3\nresume: latest\n")
    cfg = parse_config(Config, [*config, "--max_train_steps", "7", "--max_train_steps", "8"])
    assert (cfg.learning_rate, cfg.max_train_steps, cfg.resume) == (0.5, 8, "latest")
    assert parse_config(Config, ["--learning_rate", "2", *config]).learning_rate == 2
    (tmp_path / "second.yaml").write_text("learning_rate: 3\n")
    cfg = parse_config(Config, [*config, "--config", str(tmp_path / "second.yaml")])
    assert (cfg.learning_rate, cfg.max_train_steps) == (3, 3), "a second file is put over the first"
    assert parse_config(Config, []) == Config()


def test_numbers_as_yaml_writes_them(yaml_file):
    """Catches 1e-5 (a string to YAML), 5e3 and null read wrongly."""
    cfg = parse_config(Config, yaml_file("learning_rate: 5e-6\nresume: null\n"))
    assert cfg.learning_rate == 5e-6 and cfg.resume is None


def test_booleans_bare_and_in_yaml(yaml_file):
    """Catches booleans that need a value, and a YAML false that reads as true."""
    assert parse_config(Config, ["--enable_bucket"]).enable_bucket
    assert not parse_config(Config, ["--no-shuffle"]).shuffle
    assert not parse_config(Config, ["--no_shuffle"]).shuffle
    cfg = parse_config(Config, yaml_file("enable_bucket: true\nshuffle: false\n"))
    assert cfg.enable_bucket and not cfg.shuffle
    assert not parse_config(Config, [*yaml_file("enable_bucket: true\n"), "--no-enable_bucket"]).enable_bucket


def test_underscores_and_dashes(yaml_file):
    """Catches flags that are known in one spelling only."""
    assert parse_config(Config, ["--max-train-steps", "3"]).max_train_steps == 3
    assert parse_config(Config, ["--max_train_steps=4"]).max_train_steps == 4
    assert parse_config(Config, ["--enable-bucket"]).enable_bucket
    assert parse_config(Config, yaml_file("max-train-steps: 5\n")).max_train_steps == 5


def test_lists(yaml_file):
    """Catches prompts with spaces that fall apart, and empty lists."""
    prompts = ("a red circle, on black", "--not a flag")[:1] + ("größer: 3",)
    assert parse_config(Config, ["--prompts", *prompts]).prompts == prompts
    assert (
        parse_config(Config, yaml_file('prompts:\n  - a red circle, on black\n  - "größer: 3"\n')).prompts == prompts
    )
    assert parse_config(Config, yaml_file("prompts: []\n")).prompts == ()


@pytest.mark.parametrize("given", ["--max_train_step 5", "max_train_step: 5"])
def test_typos_are_errors_with_a_suggestion(given, yaml_file, capfd):
    """Catches unknown keys that are silently ignored, in YAML as on the command line."""
    with pytest.raises(SystemExit) as stopped:
        parse_config(Config, given.split() if given.startswith("--") else yaml_file(given))
    assert stopped.value.code == 2
    said = "".join(capfd.readouterr())
    assert "max_train_step" in said and "--max_train_steps" in said.replace("-train-", "_train_"), said


@pytest.mark.parametrize("flags", [["--max_train_steps", "many"], ["--optimizer", "sgd"]])
def test_wrong_values_end_with_code_2(flags, capfd):
    """Catches a traceback where a sentence should be."""
    with pytest.raises(SystemExit) as stopped:
        parse_config(Config, flags)
    assert stopped.value.code == 2
    said = "".join(capfd.readouterr())
    assert "Traceback" not in said and (flags[1] in said) and (flags[0][2:] in said.replace("-", "_")), said


def test_files_that_are_no_config(tmp_path):
    """Catches a missing file or a YAML list that ends in a traceback of another module."""
    (tmp_path / "tiny.yaml").write_text("- 1\n- 2\n")
    with pytest.raises(ValueError, match=r"no config file .*fast\.yaml; in that folder there are: tiny"):
        yaml_to_flags(tmp_path / "fast.yaml")
    with pytest.raises(ValueError, match="must hold `key: value` lines, got a list"):
        yaml_to_flags(tmp_path / "tiny.yaml")
    with pytest.raises(ValueError, match="--config needs a YAML file"):
        parse_config(Config, ["--config"])
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert parse_config(Config, ["--config", str(tmp_path / "empty.yaml")]) == Config()


def test_post_init_is_reported():
    """Catches a parser that swallows the recipe's own rules."""
    with pytest.raises(ValueError, match="max_train_steps must be at least 1, got 0"):
        parse_config(Config, ["--max_train_steps", "0"])


def test_save_and_read_back(tmp_path):
    """Catches a saved config.yaml that does not give the same run again."""
    cfg = Config(
        learning_rate=5e-6, enable_bucket=True, shuffle=False, prompts=("a: b", "größer, 'x' \"y\"", "-1"), resume="x"
    )
    save_config(cfg, tmp_path / "config.yaml")
    assert parse_config(Config, ["--config", str(tmp_path / "config.yaml")]) == cfg
    save_config(Config(), tmp_path / "config.yaml")
    assert parse_config(Config, ["--config", str(tmp_path / "config.yaml")]) == Config()


def test_help_and_table():
    """Catches a field without help, a table that misses a field, help that breaks a table's line."""
    assert field_helps(Config)["max_train_steps"] == "optimizer steps"
    lines = config_table(Config).splitlines()
    assert len(lines) == 2 + len(dataclasses.fields(Config)) and all(line.count("|") == 4 for line in lines)
    assert "| `--learning_rate` | `0.0001` | peak learning rate |" in lines


def test_help_on_the_command_line(tmp_path):
    """Catches help that does not show a flag's docstring."""
    script = tmp_path / "script.py"
    source = Path(__file__).read_text()
    script.write_text(
        "from dataclasses import dataclass\nfrom typing import Literal\nfrom common.config import parse_config\n"
        + source[source.index("@dataclass\nclass Config") : source.index("@pytest.fixture")]
        + "parse_config(Config)\n"
    )
    command = [sys.executable, script, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0 and "peak learning rate" in done.stdout and "--max_train_steps" in done.stdout, done


def test_steps_count_when_the_command_line_gives_epochs_too(tmp_path):
    """Catches a run of a hundred epochs that was told to take two steps, and a YAML's steps that hide epochs."""
    (tmp_path / "c.yaml").write_text("max_train_steps: 7\n")
    yaml = ["--config", str(tmp_path / "c.yaml")]
    assert parse_config(Config, [*yaml, "--num_train_epochs", "3"]).num_train_epochs == 3
    for flags in (["--num-train-epochs=3", "--max_train_steps", "2"], ["--max-train-steps=2", "--num_train_epochs=3"]):
        cfg = parse_config(Config, [*yaml, *flags])
        assert (cfg.num_train_epochs, cfg.max_train_steps) == (0, 2)
