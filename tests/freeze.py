"""Keeps a copy of a recipe as it is now under tests/frozen/, to prove later that old copies still run: `python
tests/freeze.py [RECIPE ...]`.

Do this once for a recipe, when it is finished; replace the copy only when a break of old copies is meant, and say so
in CHANGELOG.md.
"""

import re
import shutil
import sys

from helpers import RECIPES, ROOT


def main() -> None:
    for recipe in RECIPES:
        if not sys.argv[1:] or recipe.name in sys.argv[1:]:
            target = ROOT / "tests/frozen" / recipe.name
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir(parents=True)
            modules = re.findall(r"^from (\w+) import", (recipe / "train.py").read_text(), re.MULTILINE)
            for name in ("train.py", *(f"{module}.py" for module in modules), "accelerate", "deepspeed"):
                copy = shutil.copytree if (recipe / name).is_dir() else shutil.copy
                if (recipe / name).exists():
                    copy(recipe / name, target / name)
            print(f"{recipe.name} is frozen in {target.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
