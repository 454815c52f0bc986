"""A run's folder: who may write into it, which checkpoints it holds, its rows, its settings and environment."""

import contextlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml

from common import rules
from common.processes import Run, device_name
from common.record import integrity
from common.settings import Shared

STATE_FILE = "trainer_state.json"
# what a run leaves beside its checkpoints
RESULTS = ("validation_images/", "export/", "best/", "final/", "evaluation/")


def claim_output_dir(
    output_dir: str | Path, resume: Path | None, overwrite: bool, delete: bool = True, asked: str | None = None
) -> None:
    """Make the folder. ValueError when this run would mix its files with an earlier one's; `overwrite` deletes those.

    Called twice: at first with delete=False, and again when data and model are there, so that a mistake in the
    settings deletes nothing.

    asked: resume_from_checkpoint; "latest" with nothing to go on from begins anew, whatever pictures lie there, and
    what is newer than the checkpoint that it found is damaged.

    A new run must find no checkpoints and none of RESULTS, and a resumed one no checkpoints newer than its own:
    "latest" must never mean another branch.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    found, latest = checkpoint_folders(folder), asked == "latest"
    if resume is None:
        earlier = [*(p.name for p in found), *(name for name in RESULTS if (folder / name).exists())]
    else:
        inside = resume.resolve().parent == folder.resolve()
        earlier = [p.name for p in found if not inside or _step(p) > _step(resume)]
    if earlier and not (overwrite or latest):  # what is newer than "latest" is damaged
        raise ValueError(
            f"output_dir {folder} holds {earlier[0]} of another run; go on with --resume_from_checkpoint latest, "
            "take another --output_dir, or delete it with --overwrite_output_dir"
        )
    if delete:
        left = [*folder.glob("checkpoint-*.partial"), *folder.glob("checkpoint-*.removed")]
        for path in [*(folder / name for name in earlier), *left]:
            shutil.rmtree(path)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def read_state(folder: Path) -> dict:
    """What save_checkpoint was given as `state`, with step, launch, strategy and world_size."""
    return json.loads((folder / STATE_FILE).read_text())


def checkpoint_folders(output_dir: str | Path) -> list[Path]:
    """checkpoint-<step> folders, whole or not, oldest step first."""
    found = [p for p in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(found, key=_step)


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Complete checkpoints, oldest step first: those whose manifest is there and holds, sizes only."""
    return [folder for folder in checkpoint_folders(output_dir) if not integrity.damage(folder, hashes=False)]


def find_checkpoint(output_dir: str | Path, resume: str | None) -> Path | None:
    """The folder that `resume_from_checkpoint` means, every byte of it verified: None starts anew, "latest" is the
    newest whole one, None if there is none; anything else is a path."""
    if not resume:
        return None
    if resume == "latest":
        for folder in reversed(checkpoint_folders(output_dir)):
            if not (damage := integrity.damage(folder, hashes=True)):
                return folder
            print(f"{folder} cannot be used: {damage}; looking for the one before it", flush=True)
        if checkpoint_folders(output_dir):
            raise ValueError(f"no checkpoint in {output_dir} is whole; begin anew with --overwrite_output_dir")
        print(f"no checkpoint to go on from in {output_dir}: this run starts anew", flush=True)
        return None
    folder = next((path for path in (Path(resume), Path(output_dir) / resume) if path.is_dir()), None)
    damage = integrity.damage(folder, hashes=True) if folder else "it is no folder"
    if damage:
        names = ", ".join(p.name for p in list_checkpoints(output_dir)) or "none"
        raise ValueError(
            f"resume_from_checkpoint {resume!r} is no complete checkpoint: {damage}; "
            f"in {output_dir} there are: {names}. Or say latest"
        )
    return folder


def check_optimizer_of(checkpoint: Path | None, cfg: Shared) -> None:
    """ValueError where this run's optimizer cannot go on from what the checkpoint's kept."""
    now = cfg.tuning.optimizer
    before = read_state(checkpoint)["config"].get("optimizer", now) if checkpoint else now
    if before.removeprefix("paged_") != now.removeprefix("paged_"):
        raise ValueError(
            f"{checkpoint} holds the state of optimizer {before}, and this run has {now}: resume with --optimizer "
            f"{before}, or begin a new run from its weights (python -m common.export {checkpoint})"
        )


def append_row(path: Path, row: dict[str, Any]) -> None:
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file. A last line that was torn by a kill is left out; ValueError names any other."""
    return list(_rows_of(path))


def _rows_of(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    with open(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                if line.strip():
                    yield json.loads(line)
            except ValueError as error:
                if line.endswith("\n"):
                    raise ValueError(f"{path} line {number} is damaged; delete that line") from error


def read_thinned(path: Path, most: int = 2000) -> list[dict[str, Any]]:
    """Rows of a JSON Lines file for a drawing: every so manieth one, at most `most`, and the last one. What a run of
    any length keeps in memory while it draws."""
    kept, every, last = [], 1, None
    for number, last in enumerate(_rows_of(path)):
        if number % every == 0:
            kept.append(last)
        if len(kept) > most:
            kept, every = kept[::2], 2 * every
    return kept if not kept or kept[-1] is last else [*kept, last]


def keep_rows_until(path: Path, step: int) -> None:
    """On resume, drop rows after the checkpoint's step, so that the file reads as one straight run; on a fresh start,
    all of them."""
    if path.is_file():
        rows = [row for row in read_rows(path) if row["step"] <= step] if step else []
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def save_config(cfg: object, path: str | Path) -> None:
    """Write the resolved configuration as flat YAML that `parse_config` reads back (settings that are None stay
    out)."""
    values = {name: value for name, value in rules.flat(cfg).items() if value is not None}
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    Path(path).write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def write_environment(run: Run, cfg: Shared) -> None:
    """environment.json: versions, commit, hardware, launch file, command, rows, and the settings that are not the
    recipe's defaults, for whoever repeats the run and for the report."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for name in "torch diffusers transformers accelerate deepspeed peft bitsandbytes flashoptim safetensors".split():
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    settings, defaults = rules.flat(cfg), rules.flat(type(cfg)())
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=run.recipe_dir, capture_output=True, text=True)
    facts = {
        "versions": versions,
        "python": platform.python_version(),
        "commit": git.stdout.strip() or None,
        "processes": run.world_size,
        "launch": run.launch,
        "launch_file": os.environ.get("LAUNCH", run.launch),
        "device": device_name(),
        "gpus": torch.cuda.device_count(),
        "cores": os.cpu_count(),
        "main_memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "recipe": str(run.recipe_dir),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "rows": run.rows,
        "changed": {name: [defaults[name], value] for name, value in settings.items() if value != defaults[name]},
    }
    write_atomically(Path(cfg.run.output_dir) / "environment.json", json.dumps(facts, indent=2, default=str) + "\n")


def write_atomically(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)
