"""The plateau schedule: the learning rate is reduced, and training stopped, by what validation finds.

A pure function over a small state, the same on every process; a checkpoint keeps the state as a dictionary. At the end
of the file: how a run keeps it, goes on from it, and writes it down.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from common import rules, settings
from common.processes import Run
from common.record import trackers
from common.record.checkpoint import State
from common.record.folder import append_row, read_rows, read_state

# the settings that a stop was decided by
DECIDING = ("min_lr", "min_val_loss", "learning_rate", "lr_reduction_factor", "lr_patience", "improvement_threshold")


class PlateauSettings(Protocol):
    """What the schedule reads of the recipe's Config, where each is explained."""

    improvement_threshold: float
    lr_patience: int
    lr_reduction_factor: float
    min_lr: float
    min_val_loss: float
    best_metric: str
    run: settings.Run
    optim: settings.Optim


@dataclass(frozen=True)
class Schedule:
    """The whole state after a validation."""

    factor: float = 1.0  # of the learning rate, after all reductions
    reference: float | None = None  # the last validation loss that counted as better
    waited: int = 0  # validations since then
    decision: str = ""  # what the last validation led to
    stop_reason: str = ""
    best: float | None = None  # what best/ has: validation loss, or share of wrong answers
    best_step: int = 0
    history: tuple[dict, ...] = ()  # one row a validation, as in training_history.json


def next_schedule(state: Schedule, loss: float, cfg: PlateauSettings) -> Schedule:
    """The state after a validation with this loss.

    Better means under the last better loss by improvement_threshold of it, so that small gains add up. After
    lr_patience validations that are not, the rate is reduced; training stops instead when that would bring the rate
    under min_lr, and when the loss is under min_val_loss.
    """
    if loss < cfg.min_val_loss:
        reason = f"validation loss {loss:.4f} is under min_val_loss {cfg.min_val_loss}"
        return dataclasses.replace(state, decision="stop", stop_reason=reason)
    reference = math.inf if state.reference is None else state.reference
    if loss < reference * (1 - cfg.improvement_threshold):  # never true of nan
        return dataclasses.replace(state, reference=loss, waited=0, decision="better")
    if state.waited + 1 < cfg.lr_patience:
        return dataclasses.replace(state, waited=state.waited + 1, decision="wait")
    factor = state.factor * cfg.lr_reduction_factor
    if cfg.optim.learning_rate * factor < cfg.min_lr:
        rate = f"{cfg.optim.learning_rate * factor:.2e}"
        reason = f"no improvement, and a reduction would bring the learning rate to {rate}, under min_lr {cfg.min_lr}"
        return dataclasses.replace(state, waited=0, decision="stop", stop_reason=reason)
    return dataclasses.replace(state, factor=factor, waited=0, decision="reduce")


def decide(state: Schedule, row: dict, cfg: PlateauSettings) -> Schedule:
    """next_schedule, and whether this validation is the best so far (then best_step is its step). row: its step, and
    loss and accuracy of the task."""
    state = next_schedule(state, row["validation_loss"], cfg)
    value = row["validation_loss"] if cfg.best_metric == "validation_loss" else 1 - row["validation_accuracy"]
    if math.isfinite(value) and (state.best is None or value < state.best):
        state = dataclasses.replace(state, best=value, best_step=row["step"])
    return state


def reductions_possible(cfg: PlateauSettings) -> int:
    """How often the learning rate can be reduced before training stops; 1000 stands for always."""
    possible, rate = 0, cfg.optim.learning_rate
    while possible < 1000 and rate * cfg.lr_reduction_factor ** (possible + 1) >= cfg.min_lr:
        possible += 1
    return possible


def plateau_warning(cfg: PlateauSettings) -> str:
    """What to tell a user whose learning rate cannot be reduced twice, or ""."""
    possible = reductions_possible(cfg)
    if possible >= 2:
        return ""
    enough = cfg.min_lr / cfg.lr_reduction_factor**2
    return (
        f"warning: with learning_rate {cfg.optim.learning_rate:g}, lr_reduction_factor {cfg.lr_reduction_factor:g} "
        f"and min_lr {cfg.min_lr:g} the rate can be reduced {'once' if possible else 'never'}, and the next plateau "
        f"stops training. For two reductions take a learning_rate of at least {enough:g}, or a lower --min_lr"
    )


# ---- in a run


def schedule_of(state: State) -> Schedule:
    """What a run's state, or the checkpoint that it came from, has of the schedule; a new one before any
    validation."""
    saved = state.extra.get("schedule", {})
    return Schedule(**{**saved, "history": tuple(saved.get("history", ()))})


def resume(run: Run, cfg: PlateauSettings, state: State) -> None:
    """Where a run goes on: the schedule that it left, under the settings of now. A stop that was decided by settings
    that have changed is taken back, any other ends the run; best/ begins anew under another measure."""
    if run.resume is None:
        return
    before, now, schedule = read_state(run.resume)["config"], rules.flat(cfg), schedule_of(state)
    if any(before[name] != now[name] for name in DECIDING):
        schedule = dataclasses.replace(schedule, stop_reason="")
    if before["best_metric"] != cfg.best_metric:
        schedule = dataclasses.replace(schedule, best=None, best_step=0)
    state.extra = {"schedule": dataclasses.asdict(schedule)}
    if schedule.stop_reason:
        run.request_stop(schedule.stop_reason)


def record(run: Run, cfg: PlateauSettings, state: State, schedule: Schedule, row: dict) -> None:
    """Keep the schedule after a validation in the run's state, for the next steps and checkpoints, and write the
    validation down: validation.jsonl, training_history.json, the tracker and the screen."""
    folder, step = Path(cfg.run.output_dir), row["step"]
    row = {**row, "decision": schedule.decision, "learning_rate_factor": schedule.factor}
    if run.is_main:
        row |= {"train_loss": mean_train_loss(folder, schedule, step)} if step else {}
        append_row(folder / "validation.jsonl", row)
        numbers = {f"validation/{name}": value for name, value in row.items() if isinstance(value, float)}
        trackers.log(numbers, step)
        said = ", ".join(f"{k.replace('_', ' ')} {v:.4f}" for k, v in row.items() if k.endswith(("loss", "accuracy")))
        best = ", best so far" if step and schedule.best_step == step else ""
        run.print(f"step {step}: {said}; {schedule.decision or 'before training'}{best}")
    schedule = dataclasses.replace(schedule, history=(*schedule.history, row))
    state.lr_scale, state.extra = schedule.factor, {"schedule": dataclasses.asdict(schedule)}
    if run.is_main:
        history = {**state.extra["schedule"], "best_metric": cfg.best_metric}
        history["validations"] = history.pop("history")
        (folder / "training_history.json").write_text(json.dumps(history, indent=1) + "\n")
    run.barrier()


def mean_train_loss(output_dir: Path, schedule: Schedule, step: int) -> float:
    """Of the logged steps since the last validation."""
    since = schedule.history[-1]["step"] if schedule.history else 0
    losses = [row["loss"] for row in read_rows(output_dir / "metrics.jsonl") if since < row["step"] <= step]
    return sum(losses) / len(losses) if losses else math.nan
