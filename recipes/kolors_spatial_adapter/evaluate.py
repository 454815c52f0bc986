"""Are the boxes obeyed? Draws held-out layouts with the adapter and without, and looks where things are.

    python evaluate.py --run OUTPUT_DIR --layouts layouts.jsonl --detector google/owlv2-large-patch14-ensemble
    python evaluate.py --run OUTPUT_DIR --tau 0.3 0.6 1.0       how long must the adapter act?
    python evaluate.py --run OUTPUT_DIR --checkpoints           every checkpoint; the best by adherence is kept

Layouts are rows {"text", "objects"} (and "width", "height" where not square) in JSONL; without --layouts, those of
validation.jsonl in the run's train_data_dir. Writes results.json, table.md, sheet.png and pictures/ to --output_dir
(OUTPUT_DIR/evaluation), with --checkpoints also best_adapter/. Every setting draws a layout from the same noise.

mean_iou     of every box with what the detector calls by its phrase, 0 where nothing is; each thing counts once
AP, AP50     average precision of the detections, all phrases together, at IoU 0.50 to 0.95, and at 0.50
AR           recall at IoU 0.50 to 0.95
success      share of pictures with every object at IoU 0.5 or better, by number of objects
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(next(folder for folder in HERE.parents if (folder / "common").is_dir()))]

import common.quiet  # noqa: F401, isort: skip
import numpy as np
import torch
import yaml
from adapter import SpatialAdapter, draw, gate_values, load_adapter, save_adapter
from boxes import Box, show_boxes
from diffusers import KolorsPipeline
from layouts import read_layouts
from PIL import Image, ImageDraw

from common.data.order import make_buckets, nearest_bucket
from common.progress import progress_bar
from common.start import plan
from tiny import shapes

THRESHOLDS = tuple(round(0.5 + 0.05 * i, 2) for i in range(10))  # of IoU, as COCO's
SUCCESS = 0.5


@dataclass(frozen=True)
class Detection:
    """Something found in a picture; bbox in shares of its width and height, as in a layout."""

    phrase: str
    bbox: Box
    score: float


Detector = Callable[[Image.Image, Sequence[str]], list[Detection]]


# ---------------------------------------------------------------- detectors


def find_drawn_shapes(picture: Image.Image, phrases: Sequence[str]) -> list[Detection]:
    """The exact detector of drawn data, for phrases "colour shape"."""
    size = (picture.width, picture.height) * 2
    found = [(f"{item.colour} {item.shape}", item) for item in shapes.find_shapes(picture)]
    return [
        Detection(name, tuple(value / side for value, side in zip(item.bbox, size, strict=True)), item.score)
        for name, item in found
        if name in phrases
    ]


def load_detector(name: str, rows: Sequence[dict]) -> Detector:
    """`shapes`, or an open-vocabulary detector of transformers (OWL-ViT, OWLv2, Grounding DINO) by folder or name."""
    if name == "shapes":
        known = {f"{colour} {shape}" for colour in shapes.COLOURS for shape in shapes.SHAPES}
        unknown = sorted({item["phrase"] for row in rows for item in row["objects"]} - known)
        if unknown:
            raise ValueError(
                f"the detector `shapes` knows drawn shapes only (like 'red circle'), not {unknown[0]!r}; "
                "give --detector a folder or name of an open-vocabulary one, google/owlv2-large-patch14-ensemble say"
            )
        return find_drawn_shapes
    from transformers import pipeline  # here, since the tiny model needs none

    device = 0 if torch.cuda.is_available() else -1
    model = pipeline("zero-shot-object-detection", model=name, device=device)
    end = "." if "grounding" in model.model.config.model_type else ""  # ends a phrase in Grounding DINO's prompts

    def detect(picture: Image.Image, phrases: Sequence[str]) -> list[Detection]:
        asked = {f"{phrase}{end}": phrase for phrase in phrases}
        size = (picture.width, picture.height) * 2
        detections = []
        for item in model(picture, candidate_labels=list(asked)):
            corners = [item["box"][side] for side in ("xmin", "ymin", "xmax", "ymax")]
            bbox = tuple(min(max(value / side, 0.0), 1.0) for value, side in zip(corners, size, strict=True))
            if bbox[0] < bbox[2] and bbox[1] < bbox[3]:  # OWLv2 also sees things in its padding
                detections.append(Detection(asked[item["label"]], bbox, item["score"]))
        return detections

    return detect


# ---------------------------------------------------------------- adherence


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes [x1, y1, x2, y2]."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0.0) * max(height, 0.0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / union if union > 0 else 0.0


def object_ious(objects: Sequence[dict], detections: Sequence[Detection]) -> list[float]:
    """IoU of each object with its own detection of the same phrase, 0 for none. The best pairs find each other first;
    a detection belongs to one object at most."""
    pairs = [
        (iou(item["bbox"], detection.bbox), i, j)
        for i, item in enumerate(objects)
        for j, detection in enumerate(detections)
        if item["phrase"] == detection.phrase
    ]
    found, taken = [0.0] * len(objects), set()
    for value, i, j in sorted(pairs, reverse=True):
        if found[i] == 0 and j not in taken:
            found[i] = value
            taken.add(j)
    return found


def precision_and_recall(
    rows: Sequence[dict], detections: Sequence[Sequence[Detection]], threshold: float
) -> tuple[float, float]:
    """(average precision at 101 recalls, recall of all detections) at one IoU threshold.

    As COCO counts, all phrases being one class: by falling score each detection takes the free object of its picture
    and phrase that it overlaps most, if by the threshold; else it is a false one.
    """
    total = sum(len(row["objects"]) for row in rows)
    ranked = [(detection.score, number, detection) for number, some in enumerate(detections) for detection in some]
    taken, right = set(), []
    for _, number, detection in sorted(ranked, key=lambda item: -item[0]):
        free = [
            (iou(item["bbox"], detection.bbox), i)
            for i, item in enumerate(rows[number]["objects"])
            if item["phrase"] == detection.phrase and (number, i) not in taken
        ]
        overlap, place = max(free, default=(0.0, -1))
        right.append(overlap >= threshold)
        if right[-1]:
            taken.add((number, place))
    hits = np.cumsum(right)  # (D,) after each detection
    recall = hits / total
    precision = np.maximum.accumulate((hits / np.arange(1, len(hits) + 1))[::-1])[::-1]  # the best at this recall on
    places = np.searchsorted(recall, np.linspace(0, 1, 101))
    return float(sum(precision[place] for place in places if place < len(hits)) / 101), len(taken) / total


def adherence(rows: Sequence[dict], detections: Sequence[Sequence[Detection]]) -> dict:
    """How well pictures keep to their layouts: see the top of this file."""
    ious = [object_ious(row["objects"], some) for row, some in zip(rows, detections, strict=True)]
    curves = [precision_and_recall(rows, detections, threshold) for threshold in THRESHOLDS]
    counts = sorted({len(some) for some in ious})
    success = {count: [min(some) >= SUCCESS for some in ious if len(some) == count] for count in counts}
    return {
        "mean_iou": fmean(value for some in ious for value in some),
        "AP": fmean(precision for precision, _ in curves),
        "AP50": curves[0][0],
        "AR": fmean(recall for _, recall in curves),
        "success": {str(count): fmean(values) for count, values in success.items()},
    }


# ---------------------------------------------------------------- pictures


def draw_all(
    pipeline: KolorsPipeline,
    adapter: SpatialAdapter | None,
    rows: Sequence[dict],
    tau: float,
    args: argparse.Namespace,
    folder: Path,
) -> list[Image.Image]:
    """A picture of each layout, its noise from (seed, number of the row) alone; saved as folder/000.png, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = make_buckets(args.resolution)
    pictures = []
    for number, row in enumerate(progress_bar(rows, folder.name, unit="pictures")):
        width, height = nearest_bucket(row.get("width", 1), row.get("height", 1), sizes)
        picture = draw(
            pipeline,
            adapter,
            row["text"],
            row["objects"],
            tau,
            args.guidance_scale,
            width=width,
            height=height,
            num_inference_steps=args.num_inference_steps,
            generator=torch.Generator().manual_seed(args.seed + number),
        )
        picture.save(folder / f"{number:03d}.png")
        pictures.append(picture)
    return pictures


def write_sheet(path: Path, rows: Sequence[dict], drawn: dict[str, list[Image.Image]], side: int = 256) -> None:
    """One line a layout, one column a setting, boxes drawn in."""
    sheet = Image.new("RGB", (len(drawn) * (side + 8), 20 + len(rows) * (side + 24)), "white")
    pen = ImageDraw.Draw(sheet)
    for column, (name, pictures) in enumerate(drawn.items()):
        left = column * (side + 8) + 4
        pen.text((left, 4), name, fill="black")
        for line, (row, picture) in enumerate(zip(rows, pictures, strict=False)):
            top = 20 + line * (side + 24)
            scale = side / max(picture.size)
            resampling = Image.Resampling.NEAREST if scale > 2 else Image.Resampling.LANCZOS
            size = round(picture.width * scale), round(picture.height * scale)
            sheet.paste(show_boxes(picture.resize(size, resampling), row["objects"]), (left, top))
            if column == 0:
                pen.text((left, top + side + 4), row["text"][: side * len(drawn) // 6], fill="black")
    sheet.save(path)


def table(results: dict[str, dict], counts: Sequence[str]) -> str:
    """Markdown: a line for each setting."""
    head = ["setting", "mean IoU", "AP", "AP50", "AR", *(f"success, {n} object{'s' * (n != '1')}" for n in counts)]
    lines = [head, ["---"] * len(head)]
    for name, result in results.items():
        values = [*(result[key] for key in ("mean_iou", "AP", "AP50", "AR")), *(result["success"][n] for n in counts)]
        lines.append([name, *(f"{value:.3f}" for value in values)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def gate_table(gates: dict[str, dict[str, float]]) -> str:
    """Markdown: tanh of each layer's gate, a column for each adapter. 0 means that the layer adds nothing."""
    lines = [["gate", *gates], ["---"] * (len(gates) + 1)]
    for layer in next(iter(gates.values())):
        lines.append([layer, *(f"{values[layer]:+.3f}" for values in gates.values())])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


# ---------------------------------------------------------------- main


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="output_dir of a run")
    parser.add_argument("--base", help="model folder or hub name; the run's when not given")
    parser.add_argument("--adapter", type=Path, help="folder of an adapter; RUN/export/adapter when not given")
    parser.add_argument("--checkpoints", action="store_true", help="evaluate every RUN/checkpoint-*, keep the best")
    parser.add_argument("--layouts", type=Path, help="JSONL of layouts; validation.jsonl in the run's train_data_dir")
    parser.add_argument("--max_layouts", type=int, default=0, help="the first so many layouts; 0 takes all")
    parser.add_argument(
        "--detector", default="shapes", help="folder or hub name; shapes is exact, for drawn data only"
    )
    parser.add_argument("--tau", type=float, nargs="+", help="shares of the steps with the adapter; the run's, or 1.0")
    parser.add_argument("--output_dir", type=Path, help="RUN/evaluation, or evaluation")
    parser.add_argument("--sheet", type=int, default=16, help="layouts on sheet.png")
    parser.add_argument("--resolution", type=int, help="as in training; the run's, or 1024")
    parser.add_argument("--num_inference_steps", type=int, help="sampling steps; the run's, or 50")
    parser.add_argument("--guidance_scale", type=float, help="classifier-free guidance; the run's, or 5.0")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise")
    args = parser.parse_args()
    run = yaml.safe_load((args.run / "config.yaml").read_text()) if args.run else {}
    defaults = {"resolution": 1024, "num_inference_steps": 50, "guidance_scale": 5.0}
    for name, default in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, run.get(name, default))
    args.tau = args.tau or [run.get("tau", 1.0)]
    args.base = args.base or run.get("pretrained_model_name_or_path")
    args.layouts = args.layouts or (run and Path(run["train_data_dir"], "validation.jsonl"))
    args.output_dir = args.output_dir or (args.run or Path()) / "evaluation"
    if not args.base or not args.layouts or not (args.run or args.adapter):
        parser.error("give --run, or --base, --adapter and --layouts")
    if args.checkpoints and not args.run:
        parser.error("--checkpoints needs --run")
    return args


def adapter_folders(args: argparse.Namespace) -> dict[str, Path]:
    """{name: folder} of what to evaluate. ValueError when a run has no checkpoints."""
    if not args.checkpoints:
        return {"adapter": args.adapter or args.run / "export" / "adapter"}
    folders = sorted(args.run.glob("checkpoint-*[0-9]"), key=lambda folder: int(folder.name.split("-")[-1]))
    if not folders:
        raise ValueError(
            f"no checkpoint-* in {args.run}; train with --checkpointing_steps, or leave --checkpoints out"
        )
    return {folder.name: folder for folder in folders}


def main() -> None:
    args = parse_arguments()
    rows = [row for row in read_layouts(args.layouts) if row["objects"]]
    rows = rows[: args.max_layouts or len(rows)]
    if not rows:
        raise ValueError(f"no layout in {args.layouts} has objects; expected at least one box")
    detect = load_detector(args.detector, rows)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pipeline = KolorsPipeline.from_pretrained(args.base, dtype=dtype).to(device)
    pipeline.set_progress_bar_config(disable=True)

    results, drawn, gates = {}, {}, {}

    def evaluate(name: str, adapter: SpatialAdapter | None, tau: float) -> None:
        pictures = draw_all(pipeline, adapter, rows, tau, args, args.output_dir / "pictures" / name.replace(" ", "_"))
        phrases = [sorted({item["phrase"] for item in row["objects"]}) for row in rows]
        results[name] = adherence(rows, [detect(*each) for each in zip(pictures, phrases, strict=True)])
        drawn[name] = pictures[: args.sheet]

    evaluate("off", None, 0.0)
    folders = adapter_folders(args)
    for folder_name, folder in folders.items():
        adapter = load_adapter(folder, pipeline.unet)
        gates[folder_name] = gate_values(adapter)
        for tau in args.tau:
            evaluate(f"{folder_name} tau {tau:g}", adapter, tau)

    counts = list(results["off"]["success"])
    text = f"{len(rows)} layouts, detector {args.detector}\n\n{table(results, counts)}\n{gate_table(gates)}"
    best = max((name for name in results if name != "off"), key=lambda name: results[name]["mean_iou"])
    (args.output_dir / "table.md").write_text(text)
    summary = {"layouts": len(rows), "detector": args.detector, "best": best, "settings": results, "gates": gates}
    (args.output_dir / "results.json").write_text(json.dumps(summary, indent=1) + "\n")
    write_sheet(args.output_dir / "sheet.png", rows[: args.sheet], drawn)
    print(f"{text}\nbest: {best}; pictures, sheet.png, table.md and results.json are in {args.output_dir}")
    if args.checkpoints:
        best_folder = folders[best.split(" tau ")[0]]
        save_adapter(load_adapter(best_folder, pipeline.unet), args.output_dir / "best_adapter")
        print(f"best_adapter there is that of {best_folder.name}")


if __name__ == "__main__":
    with plan.explained_errors():
        main()
