"""One parser for a recipe's settings: a YAML file becomes flags before the command line's, and the last value wins."""

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import TypeVar

import tyro
import yaml

ConfigClass = TypeVar("ConfigClass")


def yaml_to_flags(path: str | Path) -> list[str]:
    """Flatten a YAML mapping into command-line flags: nested keys join with dots, booleans become --key or --no-key.

    Raises ValueError when the file is missing or is no mapping. Unknown keys are left for the parser to report, so
    that a typo in YAML reads as a typo on the command line does.
    """
    path = Path(path)
    if not path.is_file():
        names = sorted(p.stem for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise ValueError(f"no config file {path}; in that folder there are: {', '.join(names) or 'none'}")
    content = yaml.safe_load(path.read_text()) or {}
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


def parse_config(config_class: type[ConfigClass], argv: list[str] | None = None) -> ConfigClass:
    """Read `[--config FILE.yaml] [--flag value ...]` into a dataclass whose attribute docstrings are the help.

    Underscores and dashes are the same in flags; `--flag` and `--no-flag` set booleans. An unknown flag or YAML key
    ends the program with the nearest known names; a rule broken in `__post_init__` raises its ValueError. Of
    num_train_epochs and max_train_steps, both on the command line, the latter counts.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    flags: list[str] = []
    while "--config" in argv:
        at = argv.index("--config")
        if at + 1 == len(argv):
            raise ValueError("--config needs a YAML file after it")
        flags += yaml_to_flags(argv[at + 1])
        del argv[at : at + 2]
    quiet = os.environ.get("RANK", "0") != "0"  # a mistake is shown once, not by every process
    rules = getattr(config_class, "__post_init__", lambda cfg: None)
    config_class.__post_init__ = lambda cfg: (
        None
    )  # tyro would put its ValueError into a frame: it is called afterwards
    try:
        options = {"config": (tyro.conf.CascadeSubcommandArgs,), "use_underscores": True, "console_outputs": not quiet}
        cfg = tyro.cli(config_class, args=flags + argv, **options)
    finally:
        config_class.__post_init__ = rules
    given = {word.split("=")[0].lstrip("-").replace("-", "_") for word in argv if word.startswith("--")}
    if {"num_train_epochs", "max_train_steps"} <= given:
        cfg.num_train_epochs = 0  # steps count when both are given, as in diffusers' scripts
    rules(cfg)
    return cfg


def save_config(cfg: object, path: str | Path) -> None:
    """Write the resolved configuration as YAML that `parse_config` reads back (fields that are None stay out)."""
    values = {key: value for key, value in dataclasses.asdict(cfg).items() if value is not None}
    values = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
    Path(path).write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def changed_settings(state: dict, cfg: object) -> str:
    """What differs between the configuration in a checkpoint's state and this one, for a person to read."""
    saved, now = state["config"], json.loads(json.dumps(dataclasses.asdict(cfg)))
    changed = [f"{name} {saved[name]} -> {now[name]}" for name in now if name in saved and saved[name] != now[name]]
    return ", ".join(changed) or "none"


def config_table(config_class: type) -> str:
    """A Markdown table of every field (name, default, help), for the recipe's README; a test keeps the two equal."""
    helps = field_helps(config_class)
    rows = ["| flag | default | what it does |", "|---|---|---|"]
    for field in dataclasses.fields(config_class):
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        rows.append(f"| `--{field.name}` | `{default}` | {helps[field.name]} |")
    return "\n".join(rows)


def field_helps(config_class: type) -> dict[str, str]:
    """Each field's docstring on one line (read from the source with ast); an assertion fails where there is none."""
    import ast
    import inspect
    import textwrap

    body = ast.parse(textwrap.dedent(inspect.getsource(config_class))).body[0].body
    helps = {}
    for node, following in zip(body, body[1:] + [None], strict=True):
        if isinstance(node, ast.AnnAssign):
            is_doc = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            assert is_doc, f"Config.{node.target.id} has no docstring under it"
            helps[node.target.id] = " ".join(str(following.value.value).split())
    return helps
