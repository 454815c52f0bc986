"""common/record/trackers.py: a tracker, or a plot, never stops or slows a run, and gets what it should."""

import http.server
import os
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate import PartialState
from helpers import wait_for
from PIL import Image

from common.record import trackers


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Nothing remembered from other tests, no mode from the environment."""
    monkeypatch.setattr(trackers, "failed", set())
    monkeypatch.setattr(trackers, "workers", [])
    for name in ("WANDB_MODE", "SWANLAB_MODE"):
        monkeypatch.delenv(name, raising=False)
    yield
    for name in ("WANDB_MODE", "SWANLAB_MODE"):
        os.environ.pop(name, None)


class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(404)

    def log_message(self, *words: object) -> None:
        pass


def mode_at(port: int, monkeypatch) -> str:
    """What wandb's mode is with somebody logged in and a server at this port."""
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(trackers, "ANSWERS_WITHIN", 0.5)
    trackers.choose_mode("wandb")
    return os.environ["WANDB_MODE"]


def test_a_server_that_refuses_or_hangs_means_offline(monkeypatch, capfd):
    """Catches a run that waits for wandb for minutes: nobody listens, or somebody takes the call and says nothing."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        assert mode_at(taken.getsockname()[1], monkeypatch) == "offline"
        monkeypatch.delenv("WANDB_MODE")
        taken.listen()
        assert mode_at(taken.getsockname()[1], monkeypatch) == "offline"
    assert capfd.readouterr().out.count("cannot be reached") == 2


def test_a_server_that_answers_means_online(monkeypatch):
    """Catches an answer of 404, which a server's root may give, taken for silence."""
    with http.server.HTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert mode_at(server.server_port, monkeypatch) == "online"
        server.shutdown()


def test_what_the_user_says_is_not_asked_again(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert mode_at(1, monkeypatch) == "disabled"


@pytest.fixture
def begun(monkeypatch, tmp_path):
    """Starts a run whose trackers are classes of the test: begun(wandb=class, ...)."""

    def begin(**classes: type) -> None:
        for name, each in classes.items():
            monkeypatch.setitem(trackers.LOGGER_TYPE_TO_CLASS, name, each)
        monkeypatch.setattr(trackers, "named", lambda report_to: list(classes))
        monkeypatch.setattr(trackers, "choose_mode", lambda name: None)
        monkeypatch.setattr(trackers.rules, "flat", lambda cfg: {"seed": 3})
        settings = SimpleNamespace(report_to="all", tracker_project_name="", output_dir=str(tmp_path))
        run = SimpleNamespace(is_main=True, recipe_dir=Path("/recipes/mine"))
        trackers.start(run, SimpleNamespace(run=settings))

    return begin


class Tracker:
    """Does what a test wants when it is called."""

    requires_logging_directory = False

    def __init__(self, project: str, **settings: object):
        self.project, self.name = project, "wandb"

    def start(self) -> None:
        pass

    def store_init_configuration(self, values: dict) -> None:
        pass

    def log(self, values: dict, step: int) -> None:
        pass

    def finish(self) -> None:
        pass


def test_a_tracker_that_hangs_holds_nothing_up(begun, monkeypatch, capfd):
    """Catches training that waits for a tracker: at its start, at a step, or for ever at the end."""
    monkeypatch.setattr(trackers, "ENDS_WITHIN", 0.2)
    monkeypatch.setattr(trackers, "WAITING", 5)
    go_on = threading.Event()

    class Hanging(Tracker):
        def start(self) -> None:
            go_on.wait(30)

    began = time.monotonic()
    begun(wandb=Hanging)
    for step in range(20):
        trackers.log({"loss": 1.0}, step)
    trackers.end()
    assert time.monotonic() - began < 5
    assert capfd.readouterr().out.count("wandb failed and is left out") == 1
    go_on.set()


def test_a_failing_tracker_is_left_out_and_said_once(begun, capfd):
    """Catches a tracker's error that ends a run of days, and one that takes the others with it."""
    calls, logged = [], []

    class Failing(Tracker):
        def log(self, values: dict, step: int) -> None:
            calls.append(step)
            raise RuntimeError("no space on the tracker's side")

    class Working(Tracker):
        def store_init_configuration(self, values: dict) -> None:
            logged.append(values)

        def log(self, values: dict, step: int) -> None:
            logged.append((self.project, step, values))

        def finish(self) -> None:
            logged.append("finished")

    begun(wandb=Failing, trackio=Working)
    for step in range(3):
        trackers.log({"loss": 1.0}, step)
    trackers.end()
    assert calls == [0] and capfd.readouterr().out.count("training goes on") == 1
    assert logged == [{"seed": "3"}, *(("mine", step, {"loss": 1.0}) for step in range(3)), "finished"]


def test_a_failing_plot_is_left_out(capfd):
    trackers.attempt("curves.png", lambda: 1 / 0)
    trackers.attempt("curves.png", lambda: 1 / 0)
    assert capfd.readouterr().out.count("curves.png failed") == 1


def test_pictures_reach_wandb_with_their_captions(tmp_path, monkeypatch):
    """Catches validation pictures that a tracker never gets, or gets without what was asked for."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    PartialState(cpu=True)  # a run's accelerator makes it
    monkeypatch.setattr(trackers.rules, "flat", lambda cfg: {"seed": 3})
    Image.new("RGB", (8, 8), "red").save(tmp_path / "000.png")
    settings = SimpleNamespace(report_to="wandb", tracker_project_name="mine", output_dir=str(tmp_path))
    trackers.start(SimpleNamespace(is_main=True, recipe_dir=tmp_path), SimpleNamespace(run=settings))
    trackers.log_pictures([tmp_path / "000.png"], ["a red square"], 7)
    trackers.end()
    PartialState._reset_state()
    assert not trackers.failed
    assert list(tmp_path.glob("wandb/offline-run-*/files/media/images/validation/000_*.png"))

    def is_written() -> bool:  # by a process of wandb's own, which may write on for a moment
        return any(b"a red square" in file.read_bytes() for file in tmp_path.glob("wandb/offline-run-*/*.wandb"))

    wait_for(is_written, 60, "the caption in wandb's file")


def test_pictures_reach_tensorboard(tmp_path):
    """Catches arrays of the wrong shape or order of axes."""
    shown = []
    writer = SimpleNamespace(name="tensorboard", log_images=lambda values, **more: shown.append((values, more)))
    Image.new("RGB", (4, 6), "red").save(tmp_path / "000.png")
    trackers._show(writer, [tmp_path / "000.png"], ["a red square"], 7)
    [(values, more)] = shown
    assert list(values) == ["validation/000 a red square"] and more == {"step": 7, "dataformats": "NHWC"}
    assert values["validation/000 a red square"].shape == (1, 6, 4, 3)


def test_of_all_those_that_are_installed(monkeypatch, capfd):
    """Catches a set-up that fails because one of them is not there."""
    there = {"wandb", "swanlab"}
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: name in there or None)
    assert trackers.named("all") == ["wandb", "swanlab"] and trackers.named("none") == []
    assert trackers.named("trackio") == [] and "trackio not installed" in capfd.readouterr().out
