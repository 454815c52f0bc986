"""Rewrites the table of benches in docs/numbers.md from the recipes' READMEs: `python tests/update_numbers.py`."""

from collections import defaultdict

from helpers import ROOT
from test_plan import BENCHES, Bench, measured

PAGE = ROOT / "docs/numbers.md"
MARKERS = ("<!-- benches -->\n", "<!-- end benches -->\n")
UNITS = {"s/sample": "s a sample", "s/step": "s a step", "gib": "GiB"}


def command(bench: Bench) -> str:
    several = f"LAUNCH={bench.launch} NPROC={bench.gpus} " if bench.gpus > 1 else ""
    return f"{several}bash recipes/{bench.recipe}/run.sh bench {bench.flags}".strip()


def table() -> str:
    """What each command of test_plan.BENCHES measured, as the READMEs say it."""
    figures = defaultdict(lambda: defaultdict(set))
    for bench in sorted(BENCHES, key=lambda bench: bench.recipe):
        for name, numbers in measured(bench).items():
            figures[command(bench), f"{bench.gpus} x {bench.card}"][name] |= set(numbers)
    rows = ["| command | card | measured |", "|---|---|---|"]
    for (text, card), found in figures.items():
        said = [
            f"{' to '.join(f'{n:g}' for n in range_of(found[name]))} {UNITS[name]}" for name in UNITS if name in found
        ]
        rows.append(f"| `{text}` | {card} | {', '.join(said)} |")
    return "\n".join(rows) + "\n"


def range_of(numbers: set[float]) -> list[float]:
    return sorted({min(numbers), max(numbers)})


def with_table() -> str:
    """The page as it should be."""
    before, rest = PAGE.read_text().split(MARKERS[0])
    return before + MARKERS[0] + table() + MARKERS[1] + rest.split(MARKERS[1])[1]


if __name__ == "__main__":
    PAGE.write_text(with_table())
