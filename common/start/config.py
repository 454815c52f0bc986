"""One parser for a recipe's settings: a YAML file becomes flags before the command line's, and the last value wins."""

import inspect
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import tyro
import yaml

from common import rules
from common.settings import Shared
from common.start import lifeline, names

ConfigClass = TypeVar("ConfigClass")


def yaml_to_flags(path: str | Path) -> list[str]:
    """Flatten a YAML mapping into command-line flags: nested keys join with dots, booleans become --key or --no-key.

    Raises ValueError when the file is missing or is no mapping. Unknown keys are left for the parser to report, so
    that a typo in YAML reads as a typo on the command line does.
    """
    path = Path(path)
    if not path.is_file():
        there = sorted(p.stem for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise ValueError(f"no config file {path}; in that folder there are: {', '.join(there) or 'none'}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold `key: value` lines, got a {type(content).__name__}")
    return _flags(content, "")


def _flags(mapping: dict, prefix: str) -> list[str]:
    flags: list[str] = []
    for key, value in mapping.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            flags += _flags(value, f"{name}.")
        elif isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        else:
            flags += [f"--{name}", str(value)]
    return flags


def _config_file(given: str, config_class: type) -> Path:
    """The file as given, or where the working directory has none, that of the folder of config_class's script."""
    beside = Path(getattr(sys.modules[config_class.__module__], "__file__", "")).parent / given
    return beside if beside.is_file() and not Path(given).is_file() else Path(given)


def parse_config(
    config_class: type[ConfigClass],
    argv: list[str] | None = None,
    second_names: Mapping[str, str] = MappingProxyType({}),
    skipped: Mapping[str, str] = MappingProxyType({}),
) -> ConfigClass:
    """Read `[--config FILE.yaml] [--flag value ...]` into a dataclass whose attribute docstrings are the help.

    Underscores and dashes are the same in flags; `--flag` and `--no-flag` set booleans. An unknown flag or YAML key
    ends the program with the nearest known names. second_names: {other name of a flag, or group.key of a nested YAML:
    its name here}; skipped: {flag of another script with nothing to set here: why}.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    flags: list[str] = []
    while "--config" in argv:
        at = argv.index("--config")
        if at + 1 == len(argv):
            raise ValueError("--config needs a YAML file after it")
        flags += yaml_to_flags(_config_file(argv[at + 1], config_class))
        del argv[at : at + 2]
    quiet = os.environ.get("RANK", "0") != "0"  # a mistake is shown once, not by every process
    options = {"config": (tyro.conf.CascadeSubcommandArgs,), "use_underscores": True, "console_outputs": not quiet}
    options["description"] = inspect.getdoc(config_class) + names.described(second_names, skipped)
    try:
        return tyro.cli(config_class, args=names.translated(flags + argv, second_names, skipped), **options)
    except SystemExit as error:
        if error.code and "RANK" in os.environ:
            lifeline.fail(
                lifeline.MISTAKE, "these flags, or the config's, cannot be read: what is wrong is said above"
            )
        raise


def parse_recipe(
    config_class: type[ConfigClass],
    argv: list[str] | None = None,
    second_names: Mapping[str, str] = MappingProxyType({}),
    skipped: Mapping[str, str] = MappingProxyType({}),
) -> ConfigClass:
    """parse_config for a recipe's Config, with its rules; accelerate, torchrun and deepspeed may have started it.

    Of max_train_steps and num_train_epochs a YAML's steps give way to epochs; when the command line gives both, steps
    count, as in diffusers' scripts.
    """
    argv = names.take_launcher_flags(sys.argv[1:] if argv is None else argv)
    cfg: Shared = parse_config(config_class, argv, second_names, skipped)
    flags = (names.plain(word) for word in argv if word.startswith("--"))
    given = {second_names.get(name, name) for name in flags}
    if {"num_train_epochs", "max_train_steps"} <= given:
        cfg.batch.num_train_epochs = 0
    check(cfg)
    return cfg


def check(cfg: Shared) -> None:
    """The rules of every group, those between groups, then the recipe's own. ValueError says what, got, expected."""
    own, *shared = rules.groups(cfg)
    for group in shared:
        if isinstance(group, rules.HasRules):
            group.check()
        rules.check_numbers(group)
    if not (cfg.run.benchmark or cfg.run.plan) and cfg.data.train_data_dir is None:
        raise ValueError(
            "train_data_dir is not set; pass --train_data_dir FOLDER (or run the tiny config, which brings its own)"
        )
    if isinstance(own, rules.HasRules):
        own.check()
    rules.check_numbers(own)
