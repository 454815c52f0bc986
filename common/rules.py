"""What groups of settings have in common: their rules, and how they become one flat mapping.

A rule's ValueError says what, got and expected. Groups of settings and recipes' own `check` use these functions.
"""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
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


MOST = 10**12  # of any number: what is more overflows somewhere, or never ends


def check_numbers(group: Any) -> None:
    """The rule of every number: none is nan, infinite or beyond reason, and none is negative but those that the
    group's `signed` names."""
    for field in dataclasses.fields(group):
        value = getattr(group, field.name)
        least = -MOST if field.name in getattr(group, "signed", ()) else 0
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int | float):
                _between(field.name, least, number, MOST)


def _between(name: str, least: float, value: float, most: float) -> None:
    if not least <= value <= most:
        bound = f"at most {most}" if value > most else f"at least {least}"  # also of nan
        raise ValueError(f"{name} must be {bound}, got {short(value)}")


def short(value: object) -> str:
    text = str(value) if not isinstance(value, int) or abs(value) < 10**40 else "more than 40 digits"
    return text if len(text) <= 200 else f"{text[:197]}..."


def at_least(settings: Any, least: float, *names: str) -> None:
    for name in names:
        if not getattr(settings, name) >= least:  # refuses nan too
            raise ValueError(f"{name} must be at least {least}, got {short(getattr(settings, name))}")


def within(settings: Any, least: float, most: float, *names: str) -> None:
    for name in names:
        if not least <= getattr(settings, name) <= most:
            raise ValueError(f"{name} is a share between {least} and {most}, got {getattr(settings, name)}")


def between(settings: Any, least: float, most: float, *names: str) -> None:
    for name in names:
        _between(name, least, getattr(settings, name), most)


def under_one(settings: Any, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(settings, name) < 1:
            raise ValueError(f"{name} is a share from 0 to under 1, got {getattr(settings, name)}")


def multiple_of(settings: Any, name: str, multiple: int, why: str) -> None:
    value = getattr(settings, name)
    if value % multiple or value <= 0:
        nearest = max(multiple, round(value / multiple) * multiple)
        raise ValueError(f"{name} must be a positive multiple of {multiple} ({why}), got {value}; use {nearest}")


def writable_folder(name: str, path: str | Path) -> None:
    """Make the folder that a setting names; ValueError where that is not possible."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # a file, no permission, too long a name, a zero byte
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(f"{name} {short(path)} cannot be a folder: {reason}; give another --{name}") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise ValueError(f"{name} {short(path)} cannot be written to; change its permissions or give another --{name}")
