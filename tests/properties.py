"""given and strategies of hypothesis, with the same examples every time. conftest.py does without, so that a machine
that lacks hypothesis runs every other test."""

import hypothesis
from hypothesis import given
from hypothesis import strategies as st

hypothesis.settings.register_profile("repeatable", derandomize=True, database=None, deadline=None, max_examples=300)
hypothesis.settings.load_profile("repeatable")

__all__ = ["given", "st"]
