"""common/quiet.py: a start is free of other libraries' noise, and real errors are heard."""

import ast
import logging
import sys
import warnings

import pytest
from helpers import RECIPES

from common import quiet


@pytest.mark.parametrize("name", quiet.SAID)
def test_known_noise_is_dropped_and_errors_are_not(name):
    """Catches a logger that is silenced as a whole."""
    heard = []
    handler, logger = logging.Handler(), logging.getLogger(name)
    handler.emit = lambda record: heard.append(record.getMessage())
    logger.addHandler(handler)
    logger.warning("%s: no module", quiet.SAID[name])
    logger.error("CUDA is broken")
    logger.removeHandler(handler)
    assert heard == ["CUDA is broken"]


def test_known_warnings_are_dropped_and_others_are_not():
    """Catches deprecations of this project's own calls that nobody sees any more."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        for words in quiet.WARNED:
            warnings.filterwarnings("ignore", message=words, category=FutureWarning)
        for words in (*quiet.WARNED, "something else"):
            warnings.warn(f"{words}, and more", FutureWarning)
    assert [str(warning.message) for warning in heard] == ["something else, and more"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_scripts_are_quiet_from_the_first_import(recipe):
    """Catches an import that comes before common.quiet, and so speaks, in what a start runs."""
    for script in ("train.py", "make_tiny.py"):
        nodes = ast.parse((recipe / script).read_text()).body
        names = [n.names[0].name if isinstance(n, ast.Import) else n.module for n in nodes if hasattr(n, "names")]
        first = next(name for name in names if name.split(".")[0] not in sys.stdlib_module_names)
        assert first == "common.quiet", f"{script} imports {first} before it"
