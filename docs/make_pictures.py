"""Before and after: one picture of each recipe's tiny run, for the READMEs.

    bash recipes/NAME/run.sh                   # each recipe once
    python docs/make_pictures.py [NAME ...]    # docs/pictures/NAME.png, and the hash of what the run was made from

A picture is out of date when the tiny model, its data or its settings change; tests/test_documents.py says so.
"""

import argparse
import hashlib
import json
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parents[1]
PICTURES = ROOT / "docs/pictures"
INPUTS = ("make_tiny.py", "configs/tiny.yaml", "tiny_weights.safetensors")
SIDE, GAP, LABELS, LINE, COLUMNS = 128, 8, 80, 15, 5  # pixels, but for the last
Row = tuple[str, list[Image.Image | str]]  # its name, and a picture or a sentence for each column


def digest(recipe: Path) -> str:
    """Of what a tiny run is made from, which seldom changes."""
    return hashlib.sha256(b"".join((recipe / name).read_bytes() for name in INPUTS)).hexdigest()


def sheet(rows: list[Row]) -> Image.Image:
    """Rows of pictures or sentences with their names on the left."""
    wrapped = [[textwrap.wrap(c, SIDE // 7) if isinstance(c, str) else c for c in cells] for _, cells in rows]
    heights = [max(LINE * len(c) if isinstance(c, list) else SIDE for c in cells) + GAP for cells in wrapped]
    page = Image.new("RGB", (LABELS + len(rows[0][1]) * (SIDE + GAP), sum(heights) + GAP), "white")
    draw, font, top = ImageDraw.Draw(page), ImageFont.load_default(13), GAP
    for (name, _), cells, height in zip(rows, wrapped, heights, strict=True):
        draw.text((GAP, top), name, "black", font)
        for column, cell in enumerate(cells):
            left = LABELS + column * (SIDE + GAP)
            if isinstance(cell, list):
                draw.multiline_text((left, top), "\n".join(cell), "black", font, spacing=2)
            else:
                draw.rectangle((left - 1, top - 1, left + SIDE, top + SIDE), outline="lightgrey")
                page.paste(cell.convert("RGB").resize((SIDE, SIDE), Image.Resampling.NEAREST), (left, top))
        top += height
    return page


def drawn(run: Path) -> Image.Image:
    """What a run's validation drew before the first step and at the end, with the sources of edits or boxes."""
    folders = sorted((run / "validation_images").glob("step_*"))
    texts = sorted(folders[0].glob("???.txt"))[:COLUMNS]
    shown = [text.with_suffix(".png").name for text in texts]
    extra = {"sources": "_source_0", "with boxes": "_boxes"}
    rows: list[Row] = [("before", pictures(folders[0], shown)), ("after", pictures(folders[-1], shown))]
    for title, ending in extra.items():
        names = [name.replace(".png", f"{ending}.png") for name in shown]
        if all((folders[-1] / name).is_file() for name in names):
            rows.insert(0 if title == "sources" else 2, (title, pictures(folders[-1], names)))
    return sheet([*rows, ("", [text.read_text().strip() for text in texts])])


def pictures(folder: Path, names: list[str]) -> list[Image.Image]:
    return [Image.open(folder / name) for name in names]


def answered(run: Path, data: Path) -> Image.Image:
    """What a language model said about pictures before and after."""
    lines = (run / "evaluation/examples.jsonl").read_text().splitlines()
    examples = [json.loads(line) for line in lines]
    examples = [each for each in examples if each["id"].startswith("forward")][:COLUMNS]
    rows: list[Row] = [("shown", [Image.open(next(data.rglob(each["images"][0]))) for each in examples])]
    rows += [(name, [each[state]["prediction"] for each in examples]) for name, state in STATES]
    return sheet([*rows, ("right", [each["truth"] for each in examples])])


STATES = (("before", "base"), ("after", "trained"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="recipes; all when none is given")
    parser.add_argument("--runs", default=str(ROOT / "outputs/{}/tiny"), help="where their tiny runs are")
    given = parser.parse_args()
    hashes = json.loads((PICTURES / "inputs.json").read_text()) if (PICTURES / "inputs.json").exists() else {}
    for recipe in sorted(file.parent for file in (ROOT / "recipes").glob("*/tiny_weights.safetensors")):
        run = Path(given.runs.format(recipe.name))
        if given.names and recipe.name not in given.names:
            continue
        data = ROOT / f"outputs/{recipe.name}/tiny_base/data"
        page = drawn(run) if (run / "validation_images").is_dir() else answered(run, data)
        page.quantize(128).save(PICTURES / f"{recipe.name}.png", optimize=True)
        hashes[recipe.name] = digest(recipe)
    (PICTURES / "inputs.json").write_text(json.dumps(hashes, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
