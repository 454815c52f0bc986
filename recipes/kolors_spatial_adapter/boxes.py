"""Boxes: their check, what a crop and a flip make of them, and how much of each latent pixel they cover.

A box is [x1, y1, x2, y2], x right, y down, as shares of the picture's width and height: 0 to 1. An object is
{"phrase": "a red circle", "bbox": [x1, y1, x2, y2]}.
"""

import sys
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from common.data.json_rows import short

Box = tuple[float, float, float, float]
BOX_COLOURS = ("magenta", "darkorange", "deepskyblue", "limegreen", "gold", "black")
KEPT_SHARE = 0.2  # of an object's area that a crop must leave for the object to stay


def objects_problem(objects: object) -> str:
    """What is wrong with a row's `objects`, by object and value; "" if nothing. An empty list is fine."""
    if not isinstance(objects, list):
        return f"objects is {short(objects)}, expected a list of {{phrase, bbox}}"
    for number, item in enumerate(objects):
        if not isinstance(item, dict) or not {"phrase", "bbox"} <= item.keys():
            return f"objects[{number}] is {short(item)}, expected {{phrase, bbox}}"
        if not isinstance(item["phrase"], str) or not item["phrase"].strip():
            return f"objects[{number}] has the phrase {short(item['phrase'])}, expected words"
        if problem := box_problem(item["bbox"]):
            return f"objects[{number}] ({item['phrase'][:100]}): {problem}"
    return ""


def box_problem(bbox: object) -> str:
    """What is wrong with a box; "" if nothing."""
    said = f"bbox is {short(bbox)}"
    numbers = isinstance(bbox, list | tuple) and len(bbox) == 4 and all(type(value) in (int, float) for value in bbox)
    if not numbers:
        return f"{said}, expected four numbers [x1, y1, x2, y2]"
    if not all(abs(value) <= sys.float_info.max for value in bbox):  # nan, and whole numbers of 400 digits
        return f"{said}: not finite"
    x1, y1, x2, y2 = bbox
    if max(bbox) > 2:
        return f"{said}: looks like pixels or thousandths; divide x by the picture's width and y by its height"
    if min(bbox) < 0 or max(bbox) > 1:
        return f"{said}: out of range, expected shares from 0 to 1"
    if x2 < x1 or y2 < y1:
        return f"{said}: swapped corners, expected x1 < x2 and y1 < y2"
    if x1 == x2 or y1 == y2:
        return f"{said}: zero area"
    return ""


def check_objects(objects: object) -> None:
    """ValueError where a list of objects cannot be used."""
    if problem := objects_problem(objects):
        raise ValueError(problem)


def crop_box(bbox: Sequence[float], part: Box) -> Box | None:
    """A box of the picture as a box of `part` (a Box too) of it; None where less than KEPT_SHARE of it is left."""
    left, top, right, bottom = part
    x1, x2 = ((value - left) / (right - left) for value in (bbox[0], bbox[2]))
    y1, y2 = ((value - top) / (bottom - top) for value in (bbox[1], bbox[3]))
    kept = max(x1, 0.0), max(y1, 0.0), min(x2, 1.0), min(y2, 1.0)
    if kept[2] <= kept[0] or kept[3] <= kept[1]:
        return None
    share = (kept[2] - kept[0]) * (kept[3] - kept[1]) / ((x2 - x1) * (y2 - y1))
    return kept if share >= KEPT_SHARE else None


def flip_boxes(boxes: Tensor) -> Tensor:
    """(..., 4) boxes of the mirrored picture: left and right change places."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack([1 - x2, y1, 1 - x1, y2], dim=-1)


def largest_first(objects: Sequence[dict], limit: int) -> list[dict]:
    """The `limit` objects of largest area, the largest first."""

    def area(item: dict) -> float:
        x1, y1, x2, y2 = item["bbox"]
        return (x2 - x1) * (y2 - y1)

    return sorted(objects, key=area, reverse=True)[:limit]


def coverage(boxes: Tensor, height: int, width: int) -> Tensor:
    """boxes (..., 4) -> (..., height, width), the share of each cell of the grid that a box covers, exactly."""

    def overlap(start: Tensor, end: Tensor, cells: int) -> Tensor:  # (...,), (...,) -> (..., cells)
        edges = torch.linspace(0, 1, cells + 1, device=boxes.device)
        covered = torch.minimum(end[..., None], edges[1:]) - torch.maximum(start[..., None], edges[:-1])
        return covered.clamp(min=0) * cells

    x1, y1, x2, y2 = boxes.float().unbind(-1)
    return overlap(y1, y2, height)[..., :, None] * overlap(x1, x2, width)[..., None, :]


def show_boxes(image: Image.Image, objects: Sequence[dict]) -> Image.Image:
    """A copy of the picture with each object's box and, where there is room, its phrase."""
    shown = image.convert("RGB")
    pen = ImageDraw.Draw(shown)
    for number, item in enumerate(objects):
        x1, y1, x2, y2 = item["bbox"]
        box = x1 * image.width, y1 * image.height, x2 * image.width - 1, y2 * image.height - 1
        colour = BOX_COLOURS[number % len(BOX_COLOURS)]
        pen.rectangle(box, outline=colour, width=max(1, image.width // 256))
        if image.width >= 256:
            pen.text((box[0] + 4, box[1] + 2), item["phrase"], fill=colour)
    return shown
