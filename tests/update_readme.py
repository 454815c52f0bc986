"""Rewrites the table of settings in every recipe's README.md from its Config: `python tests/update_readme.py`."""

import re
from pathlib import Path

from helpers import RECIPES, ROOT, load_script

MARKERS = ("<!-- config table -->", "<!-- end config table -->")


def with_table(recipe: Path) -> str:
    """The recipe's README.md with its table of settings as it should be. AssertionError where the markers are not."""
    from common.start.config import config_table

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
