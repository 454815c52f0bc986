"""The curves and pictures of report.html."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from common.record.pictures import smoothed
from common.record.report_parts import Recorded, each, img, table, text

STEPS_SHOWN, PICTURES_SHOWN = 12, 16  # of validation's pictures: steps, and of a step
POINTS = 1000  # of a curve
CURVES = ("learning_rate", "grad_norm", "samples_per_second", "seconds_per_step", "peak_memory_gib")


# ---------------------------------------------------------------- curves


def thinned(items: Sequence, count: int) -> list:
    """At most `count` of the items, evenly spread, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    return [items[round(place * (len(items) - 1) / (count - 1))] for place in range(count)]


def line(rows: Sequence[dict[str, Any]], name: str, values: Sequence[float], **looks: Any) -> dict[str, Any]:
    """A line of a chart: {x: steps, y: values}. JSON has no nan: a gap stands there."""
    points = thinned(list(zip((row["step"] for row in rows), values, strict=True)), POINTS)
    y = [float(f"{value:.6g}") if math.isfinite(value) else None for _, value in points]
    return {"name": name, "x": [step for step, _ in points], "y": y, **looks}


def charts(runs: Sequence[Recorded]) -> list[dict[str, Any]]:
    """[{title, lines, shapes}, ...]: loss, held-out losses and accuracies, then what metrics.jsonl has besides."""
    held_out = dict.fromkeys(name for run in runs for row in run.validation for name in row)
    kinds = ["loss", *(name for name in held_out if name.endswith("_accuracy"))]
    kinds += [name for name in CURVES if any(name in row for run in runs for row in run.metrics[-1:])]
    others = dict.fromkeys(name for run in runs for row in run.metrics[-1:] for name in row)
    kinds += [name for name in others if name.endswith("_loss")]
    found = []
    for kind in kinds:
        lines = [line for number, run in enumerate(runs) for line in lines_of(run, kind, number, len(runs) > 1)]
        if lines:
            shapes = [shape for run in runs for shape in decisions(run)] if len(runs) == 1 else []
            found.append({"title": kind.replace("_", " ").replace(" gib", " (GiB)"), "lines": lines, "shapes": shapes})
    return found


def lines_of(run: Recorded, kind: str, number: int, compared: bool) -> Iterator[dict[str, Any]]:
    """A run's lines in the chart of a kind; colours go by run where several are compared."""
    prefix = f"{run.name} " if compared else ""
    rows = [row for row in run.metrics if isinstance(row.get(kind), (int, float))]
    if rows:
        values = [row[kind] for row in rows]
        if kind == "loss":
            if not compared:
                yield line(rows, "loss", values, faint=True, colour=number)
            yield line(rows, f"{prefix}smoothed", smoothed(values), colour=number)
        else:
            yield line(rows, prefix or kind.replace("_", " "), values, colour=number)
    names = dict.fromkeys(name for row in run.validation for name in row)
    names = dict.fromkeys(name for name in names if not rows or name != kind)
    shown = [n for n in names if n == kind or (kind == "loss" and n.endswith("_loss") and n != "train_loss")]
    for place, name in enumerate(shown, 1):
        rows = [row for row in run.validation if isinstance(row.get(name), (int, float))]
        colour = number if compared else number + place
        yield line(rows, prefix + name.replace("_", " "), [row[name] for row in rows], points=True, colour=colour)


def decisions(run: Recorded) -> list[dict[str, Any]]:
    """Dashed lines where a validation reduced the learning rate or ended the run."""
    steps = [row["step"] for row in run.validation if row.get("decision") in ("reduce", "stop")]
    looks = {"type": "line", "yref": "paper", "y0": 0, "y1": 1, "line": {"dash": "dot", "width": 1, "color": "#777"}}
    return [{"x0": step, "x1": step, **looks} for step in steps]


def drawn_curves(runs: Sequence[Recorded], curves: Sequence[dict], with_plotly: bool) -> str:
    """Places for plotly to draw in, or curves.png as it is."""
    if with_plotly:
        places = "".join(f'<div class="chart" id="chart{index}"></div>' for index in range(len(curves)))
        return f'<div class="charts">{places}</div>' if places else ""
    return each(runs, lambda run: whole_picture(run.folder / "curves.png"))


def whole_picture(path: Path) -> str:
    return img(path, path.stem, 1100, whole=True) if path.is_file() else ""


# ---------------------------------------------------------------- pictures


def steps_with_pictures(run: Recorded) -> dict[int, Path]:
    """{step: folder} of validation's pictures."""
    found = sorted((run.folder / "validation_images").glob("step_*"))
    return {int(folder.name.removeprefix("step_")): folder for folder in found if any(folder.glob("*.txt"))}


def strip(folder: Path, number: str) -> list[Path]:
    """A prompt's pictures: what belongs to it (000_source_0.png), then what was drawn."""
    return [*sorted(folder.glob(f"{number}_*.png")), *folder.glob(f"{number}.png")]


def widest(runs: Sequence[Recorded]) -> int:
    """How many pictures stand beside each other for a prompt."""
    folders = [folder for run in runs for folder in list(steps_with_pictures(run).values())[:1]]
    return max((len(strip(folder, "000")) for folder in folders), default=1)


def of_step(folder: Path) -> str:
    """All pictures of a step, with their prompts."""
    figures = []
    for prompt in thinned(sorted(folder.glob("*.txt")), PICTURES_SHOWN):
        said = prompt.read_text().strip()
        shown = "".join(img(path, said) for path in strip(folder, prompt.stem))
        figures.append(f"<figure><div>{shown}</div><figcaption>{text(said)}</figcaption></figure>")
    return f'<div class="pictures">{"".join(figures)}</div>'


def pictures(runs: Sequence[Recorded]) -> str:
    """A slider over validation's steps; of several runs each shows its newest pictures up to that step."""
    found = [(run, steps_with_pictures(run)) for run in runs]
    steps = thinned(sorted({step for _, folders in found for step in folders}), STEPS_SHOWN)
    if not steps:
        return ""
    blocks = []
    for step in steps:
        shown = {run.name: [s for s in folders if s <= step][-1:] for run, folders in found}
        parts = each(
            runs,
            lambda run, shown=shown: "".join(
                of_step(folders[s]) for r, folders in found if r is run for s in shown[run.name]
            ),
        )
        blocks.append(f'<div class="step" data-label="step {step}">{parts}</div>')
    slider = f'<input type="range" min="0" max="{len(steps) - 1}" value="{len(steps) - 1}" aria-label="step">'
    return f"<output></output>{slider}{''.join(blocks)}"


def before_and_after(runs: Sequence[Recorded]) -> str:
    """The first prompts at the first and the last validation."""
    if len(runs) > 1:
        return ""
    folders = steps_with_pictures(runs[0])
    if len(folders) < 2:
        return ""
    first, last = min(folders), max(folders)
    figures = []
    for prompt in sorted(folders[first].glob("*.txt"))[:6]:
        both = [folders[step] / f"{prompt.stem}.png" for step in (first, last)]
        if all(path.is_file() for path in both):
            shown, said = "".join(img(path, path.parent.name) for path in both), prompt.read_text().strip()
            figures.append(f"<figure><div>{shown}</div><figcaption>{text(said)}</figcaption></figure>")
    note = f'<p class="quiet">left: step {first}, right: step {last}</p>'
    return f'{note}<div class="pictures pairs">{"".join(figures)}</div>' if figures else ""


def evaluations(runs: Sequence[Recorded]) -> str:
    """What an evaluation left in the folder: table.md and plots."""

    def of_run(run: Recorded) -> str:
        folder = run.folder / "evaluation"
        tables = "".join(table_of_markdown(path.read_text()) for path in sorted(folder.glob("*.md")))
        return tables + "".join(whole_picture(path) for path in sorted(folder.glob("*.png"))[:8])

    return each(runs, of_run)


def table_of_markdown(written: str) -> str:
    """A table of table.md; text that is none is left out."""
    rows = [[cell.strip() for cell in line.strip()[1:-1].split("|")] for line in written.splitlines() if "|" in line]
    rows = [row for row in rows if any(cell.strip("-: ") for cell in row) and len(row) == len(rows[0])]
    return table(rows[0], rows[1:]) if rows else ""
