"""common/start/config.py: YAML and flags through one parser; what the user reads when something is wrong."""

import dataclasses
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from helpers import ROOT
from update_readme import config_table, field_helps

from common import image_settings, rules, settings
from common.record.folder import save_config
from common.start.config import parse_config, parse_recipe, yaml_to_flags


@dataclass
class Config:
    """An example without groups."""

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


@dataclass
class Recipe:
    """A recipe's Config: groups, a setting of its own, and a rule of its own. Two groups have other defaults."""

    pretrained_model_name_or_path: str = "owner/model"
    """local folder or a hub name"""
    shape: Literal["round", "square"] = "round"
    """of the pictures"""

    run: settings.Flat[settings.Run] = field(default_factory=settings.Run)
    data: settings.Flat[settings.Data] = field(default_factory=settings.Data)
    batch: settings.Flat[settings.Batch] = field(default_factory=lambda: settings.Batch(train_batch_size=8))
    precision: settings.Flat[settings.Precision] = field(default_factory=settings.Precision)
    speed: settings.Flat[settings.Speed] = field(default_factory=settings.Speed)
    tuning: settings.Flat[settings.AdapterTuning] = field(default_factory=settings.AdapterTuning)
    optim: settings.Flat[settings.Optim] = field(default_factory=lambda: settings.Optim(learning_rate=2e-4))
    validation: settings.Flat[settings.Validation] = field(default_factory=settings.Validation)
    prompts: settings.Flat[image_settings.Prompts] = field(default_factory=image_settings.Prompts)

    def check(self) -> None:
        if self.shape == "square" and self.batch.train_batch_size > 8:
            raise ValueError(f"square pictures come in batches of at most 8, got {self.batch.train_batch_size}")


GIVEN = ["--train_data_dir", "given"]


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


def test_rules_of_groups_and_of_the_recipe_are_reported(yaml_file):
    """Catches a parser that swallows the rules of a group, those between groups or the recipe's own, or looks at a
    YAML's value that the command line has put right."""
    with pytest.raises(ValueError, match="max_train_steps must be at least 1, got 0"):
        parse_recipe(Recipe, [*GIVEN, "--max_train_steps", "0"])
    with pytest.raises(ValueError, match="square pictures come in batches of at most 8, got 9"):
        parse_recipe(Recipe, [*GIVEN, "--shape", "square", "--train_batch_size", "9"])
    with pytest.raises(ValueError, match="train_data_dir is not set; pass --train_data_dir FOLDER"):
        parse_recipe(Recipe, [])
    assert parse_recipe(Recipe, ["--benchmark"]).data.train_data_dir is None
    yaml = yaml_file("max_train_steps: 0\n")
    assert parse_recipe(Recipe, [*yaml, *GIVEN, "--max_train_steps", "3"]).batch.max_train_steps == 3


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--logging_steps", "0"], "logging_steps must be at least 1, got 0"),
        (["--seed", "-1"], "seed must be at least 0, got -1"),
        (["--learning_rate", "nan"], "learning_rate must be at least 0, got nan"),
        (["--adam_beta2", "1.5"], "adam_beta2 is a share from 0 to under 1, got 1.5"),
        (["--global_batch_size", "-2"], "global_batch_size must be at least 0, got -2"),
        (["--dataloader_num_workers", "-1"], "dataloader_num_workers must be at least 0, got -1"),
        (["--validation_steps", "-1"], "validation_steps must be at least 0, got -1"),
    ],
)
def test_rules_say_what_and_what_they_got(flags, sentence):
    """Catches a value that cannot be meant and is found out about late, or never."""
    with pytest.raises(ValueError, match=sentence):
        parse_recipe(Recipe, [*GIVEN, *flags])


@pytest.mark.parametrize(
    ("group", "sentence"),
    [
        (image_settings.Pictures(caption_dropout=1.5), "caption_dropout is a share between 0 and 1, got 1.5"),
        (image_settings.Buckets(resolution=100), "resolution must be a positive multiple of 16 .*got 100; use 96"),
        (image_settings.Buckets(bucket_multiple=24), "bucket_multiple must be a multiple of 16, got 24; use 16 or 32"),
        (image_settings.Drawing(num_inference_steps=1), "num_inference_steps must be at least 2, got 1"),
        (settings.FullTuning(ema_decay=1.0), "ema_decay is a share from 0 to under 1, got 1.0"),
        (image_settings.FlowMatching(logit_std=-1.0), "logit_std must be at least 0, got -1.0"),
        (image_settings.FlowMatching(logit_mean=float("inf")), "logit_mean must be at most 1000000000000, got inf"),
    ],
)
def test_rules_of_the_groups_of_image_recipes(group, sentence):
    """Catches the same in groups that not every recipe has."""

    def check(group: object) -> None:
        if isinstance(group, rules.HasRules):
            group.check()
        rules.check_numbers(group)

    with pytest.raises(ValueError, match=sentence):
        check(group)
    check(type(group)())
    check(image_settings.FlowMatching(logit_mean=-1.0))  # may be negative


def test_groups_are_flat(yaml_file, capfd):
    """Catches flags or YAML keys with a group's name before them, lost defaults of a recipe, and a help that lacks a
    group's settings or shows constants."""
    cfg = parse_recipe(Recipe, [*yaml_file("adam_beta1: 0.8\noutput_dir: out\n"), *GIVEN, "--max_train_steps=7"])
    assert (cfg.optim.adam_beta1, cfg.run.output_dir, cfg.batch.max_train_steps) == (0.8, "out", 7)
    assert (cfg.batch.train_batch_size, cfg.optim.learning_rate) == (8, 2e-4)
    assert not cfg.tuning.gradient_release and cfg.tuning.export_model
    flat = rules.flat(cfg)
    names = [field.name for group in rules.groups(cfg) for field in dataclasses.fields(group)]
    assert flat.keys() == {name for name in names if not dataclasses.is_dataclass(getattr(cfg, name, None))}
    assert "gradient_release" not in flat and flat["adam_beta1"] == 0.8
    lines = config_table(Recipe).splitlines()
    assert len(lines) == 2 + len(flat) and "| `--train_batch_size` | `8` |" in "\n".join(lines)
    assert {line.split("`")[1] for line in lines[2:]} == {f"--{name}" for name in flat}
    with pytest.raises(SystemExit):
        parse_recipe(Recipe, ["--help"])
    said = capfd.readouterr().out
    assert all(f"--{name}" in said for name in flat if isinstance(flat[name], (int, float, str)) and flat[name])
    assert "--optim." not in said and "peak learning rate" in said


def test_a_setting_that_stands_twice_is_a_mistake_of_the_recipe():
    """Catches a recipe whose own setting hides one of a group."""

    @dataclass
    class Twice:
        seed: int = 1
        """of the recipe"""
        run: settings.Flat[settings.Run] = field(default_factory=settings.Run)

    with pytest.raises(AssertionError, match=r"settings that stand twice: .*seed"):
        rules.flat(Twice())


def test_save_and_read_back(tmp_path):
    """Catches a saved config.yaml that does not give the same run again."""
    cfg = Config(
        learning_rate=5e-6, enable_bucket=True, shuffle=False, prompts=("a: b", "größer, 'x' \"y\"", "-1"), resume="x"
    )
    save_config(cfg, tmp_path / "config.yaml")
    assert parse_config(Config, ["--config", str(tmp_path / "config.yaml")]) == cfg
    save_config(Config(), tmp_path / "config.yaml")
    assert parse_config(Config, ["--config", str(tmp_path / "config.yaml")]) == Config()
    recipe = parse_recipe(Recipe, [*GIVEN, "--shape", "square", "--adam_epsilon", "1e-6", "--validation_prompts", "x"])
    save_config(recipe, tmp_path / "config.yaml")
    assert parse_recipe(Recipe, ["--config", str(tmp_path / "config.yaml")]) == recipe


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
        "from dataclasses import dataclass\nfrom typing import Literal\nfrom common.start.config import parse_config\n"
        + source[source.index("@dataclass\nclass Config") : source.index("@dataclass\nclass Recipe")]
        + "parse_config(Config)\n"
    )
    command = [sys.executable, script, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0 and "peak learning rate" in done.stdout and "--max_train_steps" in done.stdout, done


def test_steps_count_when_the_command_line_gives_epochs_too(tmp_path):
    """Catches a run of a hundred epochs that was told to take two steps, and a YAML's steps that hide epochs."""
    (tmp_path / "c.yaml").write_text("max_train_steps: 7\n")
    yaml = ["--config", str(tmp_path / "c.yaml")]
    assert parse_recipe(Recipe, [*GIVEN, *yaml, "--num_train_epochs", "3"]).batch.num_train_epochs == 3
    for flags in (["--num-train-epochs=3", "--max_train_steps", "2"], ["--max-train-steps=2", "--num_train_epochs=3"]):
        batch = parse_recipe(Recipe, [*GIVEN, *yaml, *flags]).batch
        assert (batch.num_train_epochs, batch.max_train_steps) == (0, 2)


def test_steps_for_epochs():
    """Catches epochs that end early, and a step's samples that leave a factor out."""
    batch = settings.Batch(train_batch_size=2, gradient_accumulation_steps=3, max_train_steps=7)
    assert batch.samples_a_step(2) == 12 and batch.steps_for(100, 2) == 7
    batch.num_train_epochs = 3
    assert batch.steps_for(100, 2) == 25 and batch.steps_for(101, 2) == 26 and batch.steps_for(12, 2) == 3
