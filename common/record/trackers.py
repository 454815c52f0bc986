"""Trackers through accelerate. None of them ever stops or slows a run: one that cannot be reached is offline, one that
fails is left out from then on."""

import importlib.util
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from common import rules
from common.processes import Run
from common.settings import Shared

ANSWERS_WITHIN = 10  # seconds, or wandb goes offline
failed: set[str] = set()  # what has failed once and is not tried again
asking: list[threading.Thread] = []


def named(report_to: str) -> str | list[str] | None:
    """The tracker's name for accelerate; None where none is wanted or it is not installed; of "all" those that are.
    wandb is asked in the background whether it can be reached."""
    if report_to == "all":
        return [name for name in ("wandb", "tensorboard") if named(name)]
    if report_to == "none":
        return None
    if importlib.util.find_spec(report_to) is None:
        print(f"{report_to} is not installed: metrics go to metrics.jsonl and curves.png only")
        return None
    if report_to == "wandb" and "WANDB_MODE" not in os.environ:
        netrc = Path.home() / ".netrc"
        logged_in = "WANDB_API_KEY" in os.environ or (netrc.is_file() and "wandb" in netrc.read_text())
        os.environ["WANDB_MODE"] = "online" if logged_in else "offline"
        if logged_in:
            asking.append(threading.Thread(target=_ask_wandb, daemon=True))
            asking[-1].start()
    return report_to


def _ask_wandb() -> None:
    address = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    try:
        port = address.port or (80 if address.scheme == "http" else 443)
        with socket.create_connection((address.hostname, port), timeout=ANSWERS_WITHIN):
            pass
    except OSError as error:
        print(f"wandb cannot be reached ({error}): this run is logged offline; `wandb sync` uploads it later")
        os.environ["WANDB_MODE"] = "offline"


def start(run: Run, cfg: Shared) -> None:
    for thread in asking:
        thread.join(ANSWERS_WITHIN)
    settings = {name: str(value) for name, value in rules.flat(cfg).items()}
    project = cfg.run.tracker_project_name or run.recipe_dir.name
    keywords = {"wandb": {"dir": cfg.run.output_dir}}
    attempt(cfg.run.report_to, lambda: run.accelerator.init_trackers(project, settings, keywords))


def log(run: Run, cfg: Shared, values: dict[str, Any], step: int) -> None:
    attempt(cfg.run.report_to, lambda: run.accelerator.log(values, step=step))


def attempt(what: str, call: Callable[[], Any]) -> None:
    """Call what training does not need; when it fails it is said once, and not tried again."""
    if what == "none" or what in failed:
        return
    try:
        call()
    except Exception as error:  # of any library, about anything
        failed.add(what)
        print(f"{what} failed and is left out from now on, training goes on: {error}"[:300])
