"""curves.png and grid.png: what a person looks at during and after a run."""

import os
import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from common.processes import Run
from common.record import trackers
from common.record.folder import read_rows, read_thinned


def draw_curves(folder: Path) -> None:
    """curves.png: loss (smoothed, and held out), learning rate, gradient norm and samples a second, by step.

    Dashed lines stand where a validation reduced the learning rate or ended the run.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows, held_out = read_thinned(folder / "metrics.jsonl"), read_rows(folder / "validation.jsonl")
    steps = [row["step"] for row in rows]
    figure, axes = pyplot.subplots(2, 2, figsize=(12, 7), constrained_layout=True)
    for axis, name in zip(axes.flat, ["loss", "learning_rate", "grad_norm", "samples_per_second"], strict=True):
        axis.plot(steps, [row[name] for row in rows], linewidth=0.8, alpha=0.4 if name == "loss" else 1.0)
        axis.set(title=name.replace("_", " "), xlabel="step")
        axis.grid(alpha=0.3)
    axes[0, 0].plot(steps, smoothed([row["loss"] for row in rows]), label="loss, smoothed")
    for name in sorted({name for row in held_out for name in row if name.endswith("_loss")}):
        points = [(row["step"], row[name]) for row in held_out if name in row]
        axes[0, 0].plot(*zip(*points, strict=True), "o-", markersize=3, label=name.replace("_", " "))
    for row in held_out:  # what a schedule with state decided
        if row.get("decision") in ("reduce", "stop"):
            for axis in axes[0]:
                axis.axvline(row["step"], color="black", linestyle="--", linewidth=0.8)
            place = {"transform": axes[0, 1].get_xaxis_transform(), "ha": "right", "va": "top"}
            axes[0, 1].text(row["step"], 0.97, row["decision"], rotation=90, fontsize=8, **place)
    axes[0, 0].legend()
    figure.savefig(folder / "curves.png.partial", format="png", dpi=90)
    pyplot.close(figure)
    os.replace(folder / "curves.png.partial", folder / "curves.png")


def smoothed(values: Sequence[float], weight: float = 0.05) -> list[float]:
    """Exponential average of a series, started at the mean of its first values."""
    average = statistics.fmean(values[:10]) if values else 0.0
    result = []
    for value in values:
        average += weight * (value - average)
        result.append(average)
    return result


def step_folder(output_dir: str | Path, step: int) -> Path:
    """Where validation draws at a step."""
    folder = Path(output_dir) / "validation_images" / f"step_{step:06d}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def save_picture(folder: Path, index: int, text: str, image: Image.Image, **beside: Image.Image) -> None:
    """000.png with its prompt in 000.txt, and pictures that belong to it: 000_<name>.png."""
    image.save(folder / f"{index:03d}.png")
    for name, picture in beside.items():
        picture.save(folder / f"{index:03d}_{name}.png")
    (folder / f"{index:03d}.txt").write_text(text + "\n")


def save_grid(run: Run, folder: Path, prompts: Sequence[str]) -> None:
    """Called by every process when it has drawn its share."""
    run.barrier()
    if run.is_main and prompts:
        draw_grid(folder, prompts)
        files = [folder / f"{index:03d}.png" for index in range(len(prompts))]
        trackers.log_pictures(files, prompts, int(folder.name.removeprefix("step_")))


def draw_grid(folder: Path, prompts: Sequence[str], columns: int = 5, side: int = 256) -> None:
    """grid.png: the folder's 000.png, 001.png, ... with their prompts under them; what else belongs to a prompt
    (000_source_0.png, 000_target.png) stands left of its picture."""
    strips = [[*sorted(folder.glob(f"{i:03d}_*.png")), folder / f"{i:03d}.png"] for i in range(len(prompts))]
    width = max(map(len, strips)) * side  # of one prompt's pictures
    columns = min(max(1, columns * side // width), len(prompts))
    rows = -(-len(prompts) // columns)
    grid = Image.new("RGB", (columns * (width + 8), rows * (side + 44)), "white")
    draw = ImageDraw.Draw(grid)
    for index, (prompt, strip) in enumerate(zip(prompts, strips, strict=True)):
        left, top = index % columns * (width + 8) + 4, index // columns * (side + 44) + 4
        for place, file in enumerate(strip):
            image = Image.open(file)
            resampling = Image.Resampling.NEAREST if image.width < side // 2 else Image.Resampling.LANCZOS
            scale = side / max(image.size)
            image = image.resize((round(image.width * scale), round(image.height * scale)), resampling)
            grid.paste(image, (left + place * side, top))
        lines = textwrap.wrap(prompt, width // 6)
        draw.multiline_text((left, top + side + 2), "\n".join(lines[:2] + ["..."] * (len(lines) > 2)), fill="black")
    grid.save(folder / "grid.png")
