"""What report.html is made of: a run's folder as it is read, and pieces of HTML."""

import base64
import functools
import html
import io
import json
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from common.record.folder import read_rows, read_thinned

SIDE = 288  # pixels of a picture


@dataclass
class Recorded:
    """What a run's folder says, as far as it has got."""

    folder: Path
    metrics: list[dict[str, Any]]
    """of a long run some rows, evenly spread, and the last"""
    validation: list[dict[str, Any]]
    stages: list[dict[str, Any]]
    config: dict[str, Any]
    environment: dict[str, Any]
    next_steps: dict[str, str]

    @property
    def name(self) -> str:
        return f"{self.folder.parent.name}/{self.folder.name}"


def read_run(folder: Path) -> Recorded:
    """ValueError when it is no run's folder."""
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"{folder} has no config.yaml; expected the output_dir of a run")
    rows = (read_rows(folder / f"{name}.jsonl") for name in ("validation", "stages"))
    files = (folder / f"{name}.json" for name in ("environment", "next_steps"))
    values = (json.loads(file.read_text()) if file.is_file() else {} for file in files)
    config = yaml.safe_load((folder / "config.yaml").read_text()) or {}
    return Recorded(folder.absolute(), read_thinned(folder / "metrics.jsonl"), *rows, config, *values)


def text(value: object) -> str:
    return html.escape(str(value))


def page(title: str, body: Sequence[str], columns: int = 200, charts: Sequence[dict] = (), script: str = "") -> str:
    """The whole file. columns: pixels of a picture with its caption; charts: what script, plotly's, draws."""
    return string.Template((Path(__file__).with_name("report_page.html")).read_text()).substitute(
        title=text(title),
        columns=f"{columns}px",
        body="\n".join(filter(None, body)),
        charts=json.dumps(charts).replace("</", "<\\/"),
        plotly=script,
    )


def section(title: str, content: str) -> str:
    """ "" without content."""
    return f"<section><h2>{title}</h2>\n{content}\n</section>" if content else ""


def each(runs: Sequence[Recorded], show: Callable[[Recorded], str]) -> str:
    """What show makes of every run, under its name where there are several."""
    named = ((f"<h3>{text(run.name)}</h3>" if len(runs) > 1 else "", show(run)) for run in runs)
    return "\n".join(name + content for name, content in named if content)


def table(head: Sequence[str], rows: Sequence[Sequence[object]], numbers: bool = False) -> str:
    """numbers: all columns but the first are."""
    if not rows:
        return ""
    kinds = ["", *([' class="number"'] * (len(head) - 1) if numbers else [""] * (len(head) - 1))]
    lines = ["".join(f"<th{kind}>{text(name)}</th>" for name, kind in zip(head, kinds, strict=True))]
    lines += ["".join(f"<td{kind}>{text(cell)}</td>" for cell, kind in zip(row, kinds, strict=True)) for row in rows]
    return f'<div class="wide"><table>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'


@functools.lru_cache(maxsize=512)
def _jpeg(path: Path, changed: float, side: int) -> tuple[str, bool]:
    return _encoded(Image.open(path), side)


def _encoded(image: Image.Image, side: int) -> tuple[str, bool]:
    """(JPEG of at most `side` pixels in base64, whether it was small already)."""
    image, small = image.convert("RGB"), max(image.size) <= 128
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    written = io.BytesIO()
    image.save(written, "JPEG", quality=85)
    return base64.b64encode(written.getvalue()).decode(), small


def img(path: Path | Image.Image, alt: str, side: int = SIDE, whole: bool = False) -> str:
    """The picture itself, at most `side` pixels."""
    known = isinstance(path, Path)
    data, small = _jpeg(path, path.stat().st_mtime, side) if known else _encoded(path, side)
    kind = "whole" if whole else "small" if small else ""
    return f'<img class="{kind}" alt="{text(alt)}" src="data:image/jpeg;base64,{data}">'
