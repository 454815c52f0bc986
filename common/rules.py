"""What groups of settings have in common: their rules, and how they become one flat mapping.

A rule's ValueError says what, got and expected. Groups of settings and recipes' own `check` use these functions.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class HasRules(Protocol):
    def check(self) -> None:
        """ValueError for a value that cannot be meant."""


def groups(cfg: Any) -> Iterator[Any]:
    """The Config itself, then the groups in it: dataclasses with settings of their own."""
    yield cfg
    yield from (value for value in vars(cfg).values() if dataclasses.is_dataclass(value))


def flat(cfg: Any) -> dict[str, Any]:
    """{setting: value} of all groups. A name that stands twice is a mistake of the recipe."""
    values: dict[str, Any] = {}
    for group in groups(cfg):
        own = {field.name: getattr(group, field.name) for field in dataclasses.fields(group)}
        own = {name: value for name, value in own.items() if not dataclasses.is_dataclass(value)}
        assert not values.keys() & own.keys(), f"settings that stand twice: {values.keys() & own.keys()}"
        values |= own
    return values


def at_least(settings: Any, least: float, *names: str) -> None:
    for name in names:
        if not getattr(settings, name) >= least:  # refuses nan too
            raise ValueError(f"{name} must be at least {least}, got {getattr(settings, name)}")


def within(settings: Any, least: float, most: float, *names: str) -> None:
    for name in names:
        if not least <= getattr(settings, name) <= most:
            raise ValueError(f"{name} is a share between {least} and {most}, got {getattr(settings, name)}")


def multiple_of(settings: Any, name: str, multiple: int, why: str) -> None:
    value = getattr(settings, name)
    if value % multiple or value <= 0:
        nearest = max(multiple, round(value / multiple) * multiple)
        raise ValueError(f"{name} must be a positive multiple of {multiple} ({why}), got {value}; use {nearest}")
