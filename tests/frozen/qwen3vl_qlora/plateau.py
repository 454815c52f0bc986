"""The plateau schedule: the learning rate is reduced, and training stopped, by what validation finds.

A pure function over a small state, the same on every process; a checkpoint keeps the state as a dictionary.
"""

import dataclasses
import math
from dataclasses import dataclass


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


def next_schedule(state: Schedule, loss: float, cfg) -> Schedule:
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
    if cfg.learning_rate * factor < cfg.min_lr:
        rate = f"{cfg.learning_rate * factor:.2e}"
        reason = f"no improvement, and a reduction would bring the learning rate to {rate}, under min_lr {cfg.min_lr}"
        return dataclasses.replace(state, waited=0, decision="stop", stop_reason=reason)
    return dataclasses.replace(state, factor=factor, waited=0, decision="reduce")


def reductions_possible(cfg) -> int:
    """How often the learning rate can be reduced before training stops; 1000 stands for always."""
    possible = 0
    while possible < 1000 and cfg.learning_rate * cfg.lr_reduction_factor ** (possible + 1) >= cfg.min_lr:
        possible += 1
    return possible


def plateau_warning(cfg) -> str:
    """What to tell a user whose learning rate cannot be reduced twice, or ""."""
    possible = reductions_possible(cfg)
    if possible >= 2 or not cfg.validation_steps:
        return ""
    enough = cfg.min_lr / cfg.lr_reduction_factor**2
    return (
        f"warning: with learning_rate {cfg.learning_rate:g}, lr_reduction_factor {cfg.lr_reduction_factor:g} and "
        f"min_lr {cfg.min_lr:g} the rate can be reduced {'once' if possible else 'never'}, and the next plateau stops "
        f"training. For two reductions take a learning_rate of at least {enough:g}, or a lower --min_lr"
    )
