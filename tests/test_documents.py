"""What documents promise: pictures that are those of today's tiny runs, links that lead somewhere, sizes that a person
reads. Commands and tables of settings are checked by test_drift.py."""

import contextlib
import importlib.metadata
import json
import re
import tomllib
from pathlib import Path

import pytest
from helpers import RECIPES, ROOT, load_script
from packaging.requirements import Requirement
from packaging.version import Version
from PIL import Image

DOCUMENTS = [ROOT / "README.md", *(recipe / "README.md" for recipe in RECIPES), *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS += [ROOT / name for name in ("README_zh.md", "CONTRIBUTING.md", "tests/README.md")]
each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_pictures_are_of_todays_tiny_run(recipe):
    """Catches a picture of a tiny run that has changed since: run the recipe, then docs/make_pictures.py."""
    make_pictures = load_script(ROOT / "docs/make_pictures.py")
    file = make_pictures.PICTURES / f"{recipe.name}.png"
    again = f"bash recipes/{recipe.name}/run.sh && python docs/make_pictures.py {recipe.name}"
    hashes = json.loads((make_pictures.PICTURES / "inputs.json").read_text())
    assert hashes.get(recipe.name) == make_pictures.digest(recipe), again
    assert file.stat().st_size < 300_000 and Image.open(file).width <= 1000
    for readme in (ROOT / "README.md", recipe / "README.md"):
        assert f"docs/pictures/{recipe.name}.png" in readme.read_text(), f"{readme} does not show {file.name}"


def test_make_pictures_puts_before_above_after(tmp_path):
    """Catches a sheet that shows the end of a run as its beginning, or an edit without its source."""
    make_pictures = load_script(ROOT / "docs/make_pictures.py")
    for step, colour in ((0, "red"), (400, "lime"), (1200, "blue")):
        folder = tmp_path / f"validation_images/step_{step:06d}"
        folder.mkdir(parents=True)
        Image.new("RGB", (64, 64), colour).save(folder / "000.png")
        Image.new("RGB", (64, 64), "yellow").save(folder / "000_source_0.png")
        (folder / "000.txt").write_text("a picture\n")
    page, side = make_pictures.drawn(tmp_path), make_pictures.SIDE
    middle = make_pictures.LABELS + side // 2
    rows = [page.getpixel((middle, make_pictures.GAP + side // 2 + n * (side + make_pictures.GAP))) for n in range(3)]
    assert rows == [(255, 255, 0), (255, 0, 0), (0, 0, 255)]


def anchors(document: Path) -> set[str]:
    """Names that a heading can be linked by, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_document
def test_links_lead_somewhere(document):
    """Catches links to files, pictures or headings that are not there."""
    text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (document.parent / name).resolve() if name else document
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_the_first_readme_is_short():
    """Catches a front page that nobody reads to its end."""
    shown = re.sub("<details>.*?</details>", "", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(shown.splitlines()) <= 90


def test_chinese_says_the_same():
    """Catches a command, a figure of a table, a block of code or a link that one of the two languages has alone."""
    texts = [re.sub("<details>.*</details>", "", (ROOT / name).read_text(), flags=re.DOTALL) for name in LANGUAGES]
    english, chinese = map(what_is_no_language, texts)
    for one, other in zip(english, chinese, strict=True):
        assert one and one == other


LANGUAGES = ("README.md", "README_zh.md")


def what_is_no_language(text: str) -> tuple[list, ...]:
    """Blocks of code, `code`, links but for the one to the other language, and the numbers of each table's row."""
    blocks, prose = re.findall(r"^```.*?^```", text, re.MULTILINE | re.DOTALL), re.sub(r"(?ms)^```.*?^```", "", text)
    links = [link for link in re.findall(r"\]\(([^)]+)\)", prose) if link not in LANGUAGES]
    rows = [sorted(re.findall(r"\d[\d.,]*\d|\d", row)) for row in prose.splitlines() if row.startswith("|")]
    return blocks, re.findall("`[^`]+`", prose), links, rows


def pins(name: str) -> dict[str, Requirement]:
    lines = [line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    return {need.name: need for need in map(Requirement, (line for line in lines if line and line[0] != "-"))}


def test_builds_for_old_cards_fit_together():
    """Catches pins for CUDA 12.6 that setup.sh would replace, that packages refuse, or that no longer have sm_70."""
    old, tested = pins("constraints-cu126.txt"), pins("constraints.txt")
    assert old.keys() == {"torch", "torchvision", "bitsandbytes"}
    versions = {name: Version(str(need.specifier).removeprefix("==")) for name, need in old.items()}
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    for need in map(Requirement, wanted):
        assert need.name not in versions or versions[need.name] in need.specifier, need
    for name, version in versions.items():
        assert Version(version.public) in tested[name].specifier, f"{name} is not the version that the tests run with"
        assert version.local == (None if name == "bitsandbytes" else "cu126")
    assert versions["torch"] < Version("2.15"), "2.14 is the last release of torch with builds for CUDA 12.6"
    for package in tested:  # what is installed says which torch it accepts
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            for need in map(Requirement, importlib.metadata.requires(package) or []):
                if need.name in versions and (need.marker is None or need.marker.evaluate()):
                    assert versions[need.name] in need.specifier, f"{package} wants {need}"


def test_numbers_are_the_readmes():
    """Catches figures that were measured anew in a README and kept in docs/numbers.md: `python
    tests/update_numbers.py` mends it."""
    from update_numbers import PAGE, with_table

    assert PAGE.read_text() == with_table()
