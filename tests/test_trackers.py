"""common/record/trackers.py: a tracker, or a plot, never stops or slows a run."""

import os
import socket
import time
from types import SimpleNamespace

import pytest

from common.record import trackers


@pytest.fixture
def logged_in(monkeypatch):
    """Somebody who is logged in to wandb, and nothing remembered from other tests."""
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setattr(trackers, "asking", [])
    monkeypatch.setattr(trackers, "failed", set())
    pytest.importorskip("wandb")
    yield
    os.environ.pop("WANDB_MODE", None)


def answer() -> str:
    for thread in trackers.asking:
        thread.join(20)
    return os.environ["WANDB_MODE"]


def test_wandb_that_refuses_is_offline(logged_in, monkeypatch, capfd):
    """Catches a run that waits for wandb for minutes and then ends, after everything was loaded."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{taken.getsockname()[1]}")
        assert trackers.named("wandb") == "wandb"
        assert answer() == "offline" and "cannot be reached" in capfd.readouterr().out


def test_asking_happens_in_the_background(logged_in, monkeypatch):
    """Catches a set-up that stands still while wandb is asked."""
    monkeypatch.setattr(trackers.socket, "create_connection", lambda *a, **k: time.sleep(0.5) or _timeout())
    trackers.named("wandb")
    assert os.environ["WANDB_MODE"] == "online" and trackers.asking[0].is_alive()
    assert answer() == "offline"


def _timeout():
    raise TimeoutError("timed out")


def test_wandb_that_answers_is_online(logged_in, monkeypatch):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        trackers.named("wandb")
        assert answer() == "online"


def test_a_failing_tracker_is_left_out_and_said_once(monkeypatch, capfd):
    """Catches a tracker's error, or a plot's, that ends a run of days."""
    monkeypatch.setattr(trackers, "failed", set())
    calls = []

    def fail(values: dict, step: int) -> None:
        calls.append(step)
        raise RuntimeError("no space on the tracker's side")

    run, cfg = SimpleNamespace(accelerator=SimpleNamespace(log=fail)), SimpleNamespace()
    cfg.run = SimpleNamespace(report_to="wandb")
    for step in range(3):
        trackers.log(run, cfg, {"loss": 1.0}, step)
    assert calls == [0] and capfd.readouterr().out.count("training goes on") == 1
    trackers.attempt("curves.png", lambda: 1 / 0)
    assert "curves.png failed" in capfd.readouterr().out
