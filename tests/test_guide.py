"""docs/your_own_recipe.md, followed to the letter by somebody who copies its blocks one after the other."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ENVIRONMENT, ROOT, read_rows

COPY = ROOT / "recipes/copied_by_a_test_guide"  # "mine" in the guide
WRITTEN = (COPY, ROOT / "outputs" / COPY.name)


def put(code: str, file: Path) -> None:
    """Write a new file, or replace what has the same names at the top level of one."""
    if not file.exists():
        file.write_text(code)
        return
    for new in ast.parse(code).body:
        text = file.read_text()
        (old,) = (node for node in ast.parse(text).body if name_of(node) == name_of(new) is not None)
        file.write_text(text.replace(ast.get_source_segment(text, old), ast.get_source_segment(code, new)))


def name_of(node: ast.stmt) -> str | None:
    target = node.targets[0] if isinstance(node, ast.Assign) else None
    return getattr(node, "name", None) or getattr(target, "id", None)


@pytest.mark.slow
def test_the_guide_works():
    """Catches a step of the guide that no longer fits the recipe that it copies, or leaves one out."""
    text = (ROOT / "docs/your_own_recipe.md").read_text().replace("recipes/mine", f"recipes/{COPY.name}")
    environment = {**os.environ, **ENVIRONMENT, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    said = ""
    for folder in WRITTEN:
        shutil.rmtree(folder, ignore_errors=True)
    try:
        for block in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            language, code = block.groups()
            if language == "python":
                (*_, file) = re.findall(r"`(recipes/[\w/]+\.py)`", text[: block.start()])
                put(code, ROOT / file)
            else:
                script = ["bash", "-euo", "pipefail", "-c", code]
                done = subprocess.run(script, cwd=ROOT, env=environment, capture_output=True, text=True)
                assert done.returncode == 0, code + done.stdout + done.stderr
                said += done.stdout
        assert "2 passed" in said
        losses = [row["loss"] for row in read_rows(WRITTEN[1] / "tiny")]
        assert len(losses) == 30 and sum(losses[-5:]) < sum(losses[:5])
        assert (WRITTEN[1] / "tiny/validation_images/step_000030/grid.png").is_file()
        assert (WRITTEN[1] / "tiny/export/transformer/config.json").is_file()
    finally:
        for folder in WRITTEN:
            shutil.rmtree(folder, ignore_errors=True)
