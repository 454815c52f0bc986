"""Rewrites the table of settings in every recipe's README.md from its Config: `python tests/update_readme.py`."""

import ast
import dataclasses
import inspect
import re
import textwrap
from itertools import pairwise
from pathlib import Path

from helpers import RECIPES, ROOT, load_script

MARKERS = ("<!-- config table -->", "<!-- end config table -->")


def config_table(config_class: type) -> str:
    """A Markdown table of every setting: name, default, help."""
    from common import rules

    rows = ["| flag | default | what it does |", "|---|---|---|"]
    for group in rules.groups(config_class()):
        helps = field_helps(type(group))
        names = [field.name for field in dataclasses.fields(group) if field.name in helps]
        rows += [f"| `--{name}` | `{getattr(group, name)}` | {helps[name]} |" for name in names]
    return "\n".join(rows)


def field_helps(config_class: type) -> dict[str, str]:
    """Each setting's docstring on one line, groups and constants left out; an assertion fails where there is none."""
    body = ast.parse(textwrap.dedent(inspect.getsource(config_class))).body[0].body
    helps = {}
    for node, following in pairwise([*body, None]):
        if isinstance(node, ast.AnnAssign) and not re.match(r"settings\.Flat|ClassVar", ast.unparse(node.annotation)):
            is_doc = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            assert is_doc, f"{config_class.__name__}.{node.target.id} has no docstring under it"
            helps[node.target.id] = " ".join(str(following.value.value).split())
    return helps


def with_table(recipe: Path) -> str:
    """The recipe's README.md with its table of settings as it should be. AssertionError where the markers are not."""
    text = (recipe / "README.md").read_text()
    pattern = re.compile(rf"({re.escape(MARKERS[0])}\n).*?({re.escape(MARKERS[1])})", re.DOTALL)
    assert len(pattern.findall(text)) == 1, (
        f"{recipe.name}/README.md needs the lines {MARKERS[0]} and {MARKERS[1]}, once"
    )
    table = config_table(load_script(recipe / "train.py").Config)
    return pattern.sub(lambda found: f"{found[1]}{table}\n{found[2]}", text)


def main() -> None:
    for recipe in RECIPES:
        text = with_table(recipe)
        changed = text != (recipe / "README.md").read_text()
        (recipe / "README.md").write_text(text)
        print(f"{(recipe / 'README.md').relative_to(ROOT)}: {'rewritten' if changed else 'up to date'}")


if __name__ == "__main__":
    main()
