"""Rewrites tests/golden/<recipe>.json, the first losses of each recipe's tiny run: `python tests/update_golden.py
[RECIPE ...]`.

Run it when a change of the numbers is meant, and say in LOG.md why they changed.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import torch
from helpers import RECIPES, ROOT, column, load_script, run_main

STEPS = 20


def first_losses(recipe: Path, folder: Path) -> list[float]:
    """The losses of steps 1 to STEPS of the recipe's tiny config, run in `folder` in this process, with one thread."""
    from common.processes import stop

    torch.set_num_threads(1)
    tiny, out = folder / "tiny_base", folder / "out"
    load_script(recipe / "make_tiny.py").make(tiny)
    flags = ["--pretrained_model_name_or_path", tiny / "model", "--train_data_dir", tiny / "data", "--output_dir", out]
    flags += [
        "--validation_steps",
        0,
        "--checkpointing_steps",
        0,
    ]  # and stopped after STEPS, so that the schedule is kept
    argv = ["--config", recipe / "configs/tiny.yaml", *flags]
    run_main(load_script(recipe / "train.py"), argv, at_step={STEPS: lambda: setattr(stop, "asked", True)})
    return list(column(out).values())


def main() -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for recipe in RECIPES:
        if not sys.argv[1:] or recipe.name in sys.argv[1:]:
            with tempfile.TemporaryDirectory() as folder:
                losses = first_losses(recipe, Path(folder))
            file = ROOT / "tests/golden" / f"{recipe.name}.json"
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps({"config": "tiny", "losses": losses}, indent=1) + "\n")
            print(f"{file.relative_to(ROOT)}: {losses[0]:.4f} ... {losses[-1]:.4f}")


if __name__ == "__main__":
    main()
