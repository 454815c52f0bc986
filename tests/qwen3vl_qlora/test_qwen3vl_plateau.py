"""The plateau schedule, against sequences worked out by hand."""

import dataclasses
import importlib
import json
from types import SimpleNamespace

import pytest

from common.record.checkpoint import State
from common.settings import Optim


@pytest.fixture(scope="module")
def plateau(train):
    """train.py has put its folder on the path."""
    return importlib.import_module("plateau")


def settings(**changes) -> SimpleNamespace:
    values = dict(lr_patience=2, lr_reduction_factor=0.5, min_lr=6e-5, improvement_threshold=0.05, min_val_loss=0.2)
    optim = Optim(learning_rate=changes.pop("learning_rate", 4e-4))
    return SimpleNamespace(**{**values, "best_metric": "validation_loss", "optim": optim, **changes})


def decisions(plateau, losses, cfg) -> list[tuple[str, float]]:
    """(decision, learning rate) after each validation."""
    state, found = plateau.Schedule(), []
    for loss in losses:
        state = plateau.next_schedule(state, loss, cfg)
        found.append((state.decision, cfg.optim.learning_rate * state.factor))
    return found


def test_a_plateau_by_hand(plateau):
    """Catches patience that is counted from the wrong validation, a rate that is not halved, a stop that clamps."""
    losses = [2.0, 1.0, 0.96, 0.97, 0.90, 0.89, 0.90, 0.91, 0.90, 0.99, 0.98]
    expected = [
        ("better", 4e-4),  # the first one always is
        ("better", 4e-4),  # 1.0 < 2.0 * 0.95
        ("wait", 4e-4),  # 0.96 is not under 0.95
        ("reduce", 2e-4),  # the second in a row
        ("better", 2e-4),  # 0.90 < 0.95: from 1.0, not from 0.96
        ("wait", 2e-4),
        ("reduce", 1e-4),
        ("wait", 1e-4),
        ("stop", 1e-4),  # 5e-5 would be under min_lr
    ]
    assert decisions(plateau, losses[:9], settings()) == [(name, pytest.approx(rate)) for name, rate in expected]


def test_the_threshold_is_relative(plateau):
    """Catches an absolute threshold: 5% of 0.5 is 0.025, and just under it is better, just over is not."""
    assert [name for name, _ in decisions(plateau, [0.5, 0.4749], settings())] == ["better", "better"]
    assert [name for name, _ in decisions(plateau, [0.5, 0.4751], settings())] == ["better", "wait"]
    assert [name for name, _ in decisions(plateau, [100.0, 96.0], settings())] == ["better", "wait"]


def test_small_gains_add_up(plateau):
    """Catches a reference that follows every loss: 3% a time is 5% in two."""
    names = [name for name, _ in decisions(plateau, [1.0, 0.97, 0.94, 0.91, 0.88], settings(lr_patience=3))]
    assert names == ["better", "wait", "better", "wait", "better"]


def test_patience_of_one(plateau):
    cfg = settings(lr_patience=1)
    assert [name for name, _ in decisions(plateau, [1.0, 1.0, 1.0, 1.0], cfg)] == [
        "better",
        "reduce",
        "reduce",
        "stop",
    ]


def test_low_loss_stops(plateau):
    """Catches a min_val_loss that is not looked at, and a reason that does not say so."""
    state = plateau.next_schedule(plateau.Schedule(), 0.199, settings())
    assert state.decision == "stop" and "min_val_loss" in state.stop_reason
    assert plateau.next_schedule(plateau.Schedule(), 0.201, settings()).stop_reason == ""
    assert plateau.next_schedule(plateau.Schedule(), 0.0, settings(min_val_loss=0.0)).stop_reason == ""


def test_nan_is_no_improvement(plateau):
    """Catches a nan that becomes the reference, which nothing is ever better than."""
    names = [name for name, _ in decisions(plateau, [1.0, float("nan"), float("nan"), 0.5], settings())]
    assert names == ["better", "wait", "reduce", "better"]
    assert plateau.next_schedule(plateau.Schedule(), float("nan"), settings()).reference is None


def test_min_lr_zero_never_stops(plateau):
    cfg = settings(min_lr=0.0, lr_patience=1)
    assert decisions(plateau, [1.0] * 30, cfg)[-1][0] == "reduce" and plateau.plateau_warning(cfg) == ""


def test_the_state_survives_json(plateau):
    """Catches state that a checkpoint does not keep: going on from JSON decides as going on from memory does."""
    losses = [2.0, 1.0, 0.96, 0.97, 0.98, 0.99, 0.95, 0.99]
    state, again = plateau.Schedule(), plateau.Schedule()
    for loss in losses:
        state = plateau.next_schedule(state, loss, settings())
        again = plateau.next_schedule(again, loss, settings())
        kept = json.loads(json.dumps({"schedule": dataclasses.asdict(again)}))
        again = plateau.schedule_of(State(0, [], "", {}, extra=kept))
        assert state == again
    assert plateau.schedule_of(State(0, [], "", {})) == plateau.Schedule()


@pytest.mark.parametrize(
    ("rate", "word"), [(1e-4, "never"), (1.3e-4, "once"), (2.3e-4, "once"), (2.4e-4, ""), (4e-4, "")]
)
def test_warning_when_the_rate_cannot_fall_twice(plateau, rate, word):
    """Catches a config that stops at its first plateau without a word: 1e-4 halved once is under 6e-5."""
    said = plateau.plateau_warning(settings(learning_rate=rate))
    assert (word in said and "at least 0.00024" in said) if word else said == ""
    cfg = settings(learning_rate=rate, lr_patience=1)
    reductions = [name for name, _ in decisions(plateau, [1.0] * 9, cfg)].index("stop") - 1
    assert (reductions >= 2) == (said == ""), "what the warning counts is what the schedule does"
