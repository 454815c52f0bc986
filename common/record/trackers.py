"""Trackers through accelerate's own. None of them ever stops or slows a run: each has a thread to start, log and end
in; one that does not answer is offline, one that fails is left out, one that hangs is left behind."""

import importlib
import importlib.util
import os
import queue
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from PIL import Image

from common import rules
from common.processes import Run
from common.settings import Shared

KNOWN = ("wandb", "tensorboard", "trackio", "swanlab")
ANSWERS_WITHIN, ENDS_WITHIN = 10, 60  # seconds, or it goes offline; or it is left behind
WAITING = 10_000  # things to be logged that may wait
# (variable of the mode, online, variable of the server, the usual one, variable of the key, file of keys)
SERVERS = {
    "wandb": ("WANDB_MODE", "online", "WANDB_BASE_URL", "https://api.wandb.ai", "WANDB_API_KEY", ".netrc"),
    "swanlab": (
        "SWANLAB_MODE",
        "cloud",
        "SWANLAB_API_HOST",
        "https://api.swanlab.cn",
        "SWANLAB_API_KEY",
        ".swanlab/.netrc",
    ),
}
failed: set[str] = set()  # what has failed once and is not tried again


class Worker:
    """A tracker and its thread."""

    def __init__(self, name: str):
        self.name = name
        self.tracker: GeneralTracker | None = None
        self.waiting: queue.Queue[Callable[[], Any] | None] = queue.Queue(WAITING)
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def _work(self) -> None:
        while (call := self.waiting.get()) is not None:
            attempt(self.name, call)

    def do(self, call: Callable[[], Any] | None) -> None:
        """Later; None ends the thread. Where thousands wait already the tracker hangs, and more is left out."""
        try:
            self.waiting.put_nowait(call)
        except queue.Full:
            leave_out(self.name, "it takes nothing any more")

    def start(self, project: str, settings: dict[str, str], output_dir: str) -> None:
        choose_mode(self.name)
        tracker_class = LOGGER_TYPE_TO_CLASS[self.name]
        folder = [output_dir] if tracker_class.requires_logging_directory else []
        settings_of_library = {"wandb": {"dir": output_dir}, "swanlab": {"logdir": f"{output_dir}/swanlab"}}
        self.tracker = tracker_class(project, *folder, **settings_of_library.get(self.name, {}))
        self.tracker.start()
        self.tracker.store_init_configuration(settings)


workers: list[Worker] = []  # of this process, since a process is one run


def named(report_to: str) -> list[str]:
    """The trackers that are meant: one, or of "all" those that are installed."""
    if report_to == "none":
        return []
    names = [name for name in KNOWN if report_to in (name, "all")]
    installed = [name for name in names if importlib.util.find_spec(name)]
    if not installed:
        print(f"{' '.join(names)} not installed: metrics go to metrics.jsonl, curves.png and report.html only")
    return installed


def choose_mode(name: str) -> None:
    """Online where somebody is logged in and the server answers in time, unless the user's variables say."""
    if name not in SERVERS or SERVERS[name][0] in os.environ:
        return
    mode, online, server, usual, key, keys = SERVERS[name]
    file, address = Path.home() / keys, os.environ.get(server, usual)
    os.environ[mode] = "offline"
    if key in os.environ or (file.is_file() and name in file.read_text()):
        try:
            urllib.request.urlopen(address, timeout=ANSWERS_WITHIN).close()
            os.environ[mode] = online
        except urllib.error.HTTPError:  # an answer, too
            os.environ[mode] = online
        except OSError as error:
            print(f"{name} cannot be reached ({error}): this run is logged offline; `{name} sync` uploads it later")


def start(run: Run, cfg: Shared) -> None:
    """Called by every process; the main one has the trackers."""
    workers.clear()
    if not run.is_main:
        return
    settings = {name: str(value) for name, value in rules.flat(cfg).items()}
    project = cfg.run.tracker_project_name or run.recipe_dir.name
    for name in named(cfg.run.report_to):
        worker = Worker(name)
        worker.do(lambda worker=worker: worker.start(project, settings, cfg.run.output_dir))
        workers.append(worker)


def log(values: dict[str, float], step: int) -> None:
    for worker in workers:
        worker.do(lambda worker=worker: worker.tracker.log(values, step=step))


def log_pictures(files: Sequence[Path], captions: Sequence[str], step: int) -> None:
    """Validation's pictures with their captions."""
    for worker in workers:
        worker.do(lambda worker=worker: _show(worker.tracker, files, captions, step))


def _show(tracker: GeneralTracker, files: Sequence[Path], captions: Sequence[str], step: int) -> None:
    if tracker.name == "tensorboard":
        import numpy as np

        for file, caption in zip(files, captions, strict=True):
            pixels = np.asarray(Image.open(file).convert("RGB"))[None]  # (1, H, W, 3)
            tracker.log_images({f"validation/{file.stem} {caption}": pixels}, step=step, dataformats="NHWC")
        return
    library = importlib.import_module(tracker.name)  # wandb, trackio and swanlab have the same class
    pictures = [library.Image(str(file), caption=caption) for file, caption in zip(files, captions, strict=True)]
    for picture, file in zip(pictures, files, strict=True):
        tracker.log({f"validation/{file.stem}": picture}, step=step)


def end() -> None:
    """Let the trackers send what is left, for a while."""
    for worker in workers:
        worker.do(lambda worker=worker: worker.tracker.finish())
        worker.do(None)
    for worker in workers:
        worker.thread.join(ENDS_WITHIN)
        if worker.thread.is_alive():
            leave_out(worker.name, f"it has not finished after {ENDS_WITHIN} seconds")
    workers.clear()


def leave_out(what: str, why: object) -> None:
    if what not in failed:
        failed.add(what)
        print(f"{what} failed and is left out from now on, training goes on: {why}"[:300], flush=True)


def attempt(what: str, call: Callable[[], Any]) -> None:
    """Call what training does not need; when it fails it is said once, and not tried again."""
    if what in failed:
        return
    try:
        call()
    except Exception as error:  # of any library, about anything
        leave_out(what, error)
