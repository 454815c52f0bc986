"""Drawn scenes of coloured shapes, their captions, and a finder that reads them back from any picture.

Model-free. The tiny datasets are drawn with it, and the tests ask the finder whether a trained model shows what the
caption says. Boxes are (x0, y0, x1, y1) in pixels, x right, y down, x1 and y1 exclusive; sizes are (width, height).
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "cross", "ring", "star")
COLOURS = {
    "red": (225, 35, 35),
    "green": (30, 165, 60),
    "blue": (40, 80, 235),
    "yellow": (250, 220, 40),
    "purple": (160, 40, 200),
    "cyan": (40, 210, 225),
    "grey": (128, 128, 128),
}
BACKGROUNDS = {"white": (245, 245, 245), "black": (15, 15, 15), "sand": (225, 195, 150), "navy": (20, 30, 90)}
# the object's centre, as a share of the free play that the object's size leaves: 0 touches the left or the top
PLACES = {
    "in the centre": (0.5, 0.5),
    "on the left": (0.0, 0.5),
    "on the right": (1.0, 0.5),
    "at the top": (0.5, 0.0),
    "at the bottom": (0.5, 1.0),
}

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Found:
    """One object: what `draw` draws and what `find_shapes` finds. `score` is the finder's IoU with the named shape."""

    colour: str
    shape: str
    bbox: Box
    score: float = 1.0


def place_box(place: str, size: tuple[int, int], extent: float, rng: random.Random | None = None) -> Box:
    """The square box of side `extent` pixels at a named place of a picture of `size`; `rng` moves it a little."""
    if place not in PLACES:
        raise ValueError(f"unknown place {place!r}; expected one of {', '.join(map(repr, PLACES))}")
    box = []
    for share, length in zip(PLACES[place], size, strict=True):
        margin = 0.05 * length
        wobble = rng.uniform(-0.02, 0.02) * length if rng else 0.0
        start = margin + share * (length - extent - 2 * margin) + wobble
        box.append(min(max(start, 0.0), length - extent))
    return (box[0], box[1], box[0] + extent, box[1] + extent)


def place_of(bbox: Box, size: tuple[int, int]) -> str:
    """The named place whose centre is nearest to the box's centre."""
    extent = max(bbox[2] - bbox[0], bbox[3] - bbox[1])
    centre = ((bbox[0] + bbox[2]) / 2, (bbox[1] + bbox[3]) / 2)

    def distance(place: str) -> float:
        box = place_box(place, size, extent)
        return ((box[0] + box[2]) / 2 - centre[0]) ** 2 + ((box[1] + box[3]) / 2 - centre[1]) ** 2

    return min(PLACES, key=distance)


def _outline(draw: ImageDraw.ImageDraw, shape: str, box: Box, fill, background) -> None:
    x0, y0, x1, y1 = box
    width, height = x1 - x0, y1 - y0

    def points(*shares: tuple[float, float]) -> list[tuple[float, float]]:
        return [(x0 + x * width, y0 + y * height) for x, y in shares]

    if shape == "circle":
        draw.ellipse(box, fill=fill)
    elif shape == "square":
        draw.rectangle(box, fill=fill)
    elif shape == "triangle":
        draw.polygon(points((0.5, 0), (1, 1), (0, 1)), fill=fill)
    elif shape == "cross":
        draw.rectangle((x0, y0 + height / 3, x1, y0 + height * 2 / 3), fill=fill)
        draw.rectangle((x0 + width / 3, y0, x0 + width * 2 / 3, y1), fill=fill)
    elif shape == "ring":
        draw.ellipse(box, fill=fill)
        draw.ellipse((x0 + width / 4, y0 + height / 4, x1 - width / 4, y1 - height / 4), fill=background)
    elif shape == "star":
        radii = [0.55, 0.22] * 5  # a star's box is not quite square: this one fills (0..1, 0..1) but for a few percent
        turns = [np.pi * (i / 5 - 0.5) for i in range(10)]
        draw.polygon(
            points(*((0.5 + r * np.cos(t) * 0.96, 0.55 + r * np.sin(t)) for r, t in zip(radii, turns, strict=True))),
            fill=fill,
        )
    else:
        raise ValueError(f"unknown shape {shape!r}; expected one of {', '.join(SHAPES)}")


def draw(objects: Sequence[Found], background: str = "white", size: tuple[int, int] = (64, 64)) -> Image.Image:
    """Draws the objects in order, antialiased, on a plain background.

    Args:
        objects: colour and shape names with their boxes in pixels of the finished picture.
        background: a name of BACKGROUNDS.
        size: (width, height) in pixels.

    Returns:
        An RGB picture.
    """
    for what, name, known in [("background", background, BACKGROUNDS)] + [
        ("colour", item.colour, COLOURS) for item in objects
    ]:
        if name not in known:
            raise ValueError(f"unknown {what} {name!r}; expected one of {', '.join(known)}")
    scale = 4
    picture = Image.new("RGB", (size[0] * scale, size[1] * scale), BACKGROUNDS[background])
    pen = ImageDraw.Draw(picture)
    for item in objects:
        x0, y0, x1, y1 = (value * scale for value in item.bbox)
        _outline(pen, item.shape, (x0, y0, x1 - 1, y1 - 1), COLOURS[item.colour], BACKGROUNDS[background])
    return picture.resize(size, Image.Resampling.BOX)


def caption(objects: Sequence[Found], background: str, size: tuple[int, int] = (64, 64), colours: bool = True) -> str:
    """Says what `draw` draws: "a red circle on the left, on a white background". Without `colours`: "a circle ..."."""
    if not objects:
        return f"an empty {background} background"
    parts = []
    for item in objects:
        name = f"{item.colour} {item.shape}" if colours else item.shape
        parts.append(f"a {name} {place_of(item.bbox, size)}")
    return f"{' and '.join(parts)}, on a {background} background"


def find_background(image: Image.Image) -> str:
    """The background whose colour is nearest to the median of the picture's rim."""
    colour = _rim_colour(_pixels(image, 64)[0])
    return min(BACKGROUNDS, key=lambda name: float(np.square(colour - np.array(BACKGROUNDS[name])).sum()))


def find_shapes(image: Image.Image, min_area: float = 0.015, min_score: float = 0.7) -> list[Found]:
    """Finds the objects on a plain background, robust to blur, noise and slightly wrong colours.

    Pixels unlike the rim are grouped into connected components; a component is named by its palette colour (two
    colours that touch are two objects) and by the shape whose mask has the highest IoU with it, both stretched to one
    box.

    Args:
        image: any picture; taken as RGB, and read at 64 pixels on its longer side at least, 128 at most.
        min_area: components smaller than this share of the picture are noise.
        min_score: below this IoU an object is named "unknown".

    Returns:
        Objects with boxes in the picture's own pixels, from left to right.
    """
    pixels, scale = _pixels(image, 128)
    difference = np.sqrt(np.square(pixels - _rim_colour(pixels)).sum(-1))
    names = list(COLOURS)
    palette = np.array([COLOURS[name] for name in names], dtype=np.float32)
    nearest = np.square(pixels[:, :, None] - palette).sum(-1).argmin(-1)
    found = []
    for component in _components(difference > 60):
        component &= difference > 0.5 * np.percentile(difference[component], 85)  # the true edge of a blurred object
        if component.sum() < min_area * component.size:
            continue
        core = _erode(component)
        core = core if core.sum() > 0.2 * component.sum() else component
        counts = np.bincount(nearest[core], minlength=len(names))
        colours = [index for index in np.flatnonzero(counts) if counts[index] >= 0.25 * counts.sum()]
        for index in colours or [int(counts.argmax())]:
            mask = component if len(colours) < 2 else component & (nearest == index)
            found.append(_name_shape(mask, names[index], scale, min_score))
    return sorted(found, key=lambda item: (item.bbox[0], item.bbox[1]))


def read_caption(text: str) -> tuple[list[tuple[str, str, str]], str]:
    """What a caption made by `caption` asks for: [(colour or "", shape, place)] and the background."""
    places, colours = "|".join(PLACES), "|".join(COLOURS)
    objects = re.findall(rf"\ba (?:({colours}) )?({'|'.join(SHAPES)}) ({places})", text)
    background = re.search(rf"({'|'.join(BACKGROUNDS)}) background$", text)
    if background is None or (not objects and not text.startswith("an empty ")):
        expected = "'a red circle on the left, on a white background'"
        raise ValueError(f"not a caption of drawn shapes: {text!r}; expected the form {expected}")
    return objects, background[1]


def shows(image: Image.Image, text: str, check_place: bool = False) -> bool:
    """True when the picture holds exactly the objects that the caption names, in its colour, shape (and place) each.

    A colour that the caption does not name may be any.
    """
    wanted, _ = read_caption(text)
    found = find_shapes(image)
    if len(found) != len(wanted):
        return False
    for colour, shape, place in wanted:
        match = [
            item
            for item in found
            if item.shape == shape
            and colour in ("", item.colour)
            and (not check_place or place_of(item.bbox, image.size) == place)
        ]
        if not match:
            return False
        found.remove(match[0])
    return True


def same_objects(image: Image.Image, expected: Image.Image, tolerance: float = 0.06) -> bool:
    """True when both pictures show the same objects: as many, of the same colours and shapes, at the same places.

    Args:
        image, expected: pictures of any sizes; boxes are compared as shares of width and height.
        tolerance: how far an edge of an object's box may be off, as a share of the picture.
    """

    def shares(picture: Image.Image, item: Found) -> np.ndarray:
        return np.array(item.bbox) / (picture.size * 2)

    found = find_shapes(image)
    for wanted in find_shapes(expected):
        match = [
            item
            for item in found
            if (item.colour, item.shape) == (wanted.colour, wanted.shape)
            and np.abs(shares(image, item) - shares(expected, wanted)).max() <= tolerance
        ]
        if not match:
            return False
        found.remove(match[0])
    return not found


def _pixels(image: Image.Image, longest: int) -> tuple[np.ndarray, float]:
    """(H, W, 3) float32 in 0..255 of the picture shrunk to `longest`, and original pixels per pixel of it."""
    image = image.convert("RGB")
    scale = max(1.0, max(image.size) / longest)
    if scale > 1:
        size = (max(1, round(image.width / scale)), max(1, round(image.height / scale)))
        image = image.resize(size, Image.Resampling.BOX)
    return np.asarray(image, dtype=np.float32), scale


def _rim_colour(pixels: np.ndarray) -> np.ndarray:
    rim = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3), pixels[:, 0], pixels[:, -1]])
    return np.median(rim, axis=0)


def _neighbours(mask: np.ndarray) -> list[np.ndarray]:
    padded = np.pad(mask, 1)
    return [padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]]


def _erode(mask: np.ndarray) -> np.ndarray:
    return np.logical_and.reduce([mask, *_neighbours(mask)])


def _components(mask: np.ndarray) -> list[np.ndarray]:
    """Splits a (H, W) boolean mask into its 4-connected components: each pixel takes its neighbours' highest label."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        spread = np.where(mask, np.maximum.reduce([labels, *_neighbours(labels)]), 0)
        if np.array_equal(spread, labels):
            return [labels == label for label in np.unique(labels[mask])]
        labels = spread


@lru_cache
def _templates() -> dict[str, np.ndarray]:
    return {name: _stretch(np.asarray(draw([Found("grey", name, (0, 0, 64, 64))]))[:, :, 0] < 187) for name in SHAPES}


def _stretch(mask: np.ndarray) -> np.ndarray:
    """The mask's bounding box stretched to (32, 32), boolean."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    crop = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    picture = Image.fromarray((crop * 255).astype(np.uint8)).resize((32, 32), Image.Resampling.BILINEAR)
    return np.asarray(picture) > 127


def _name_shape(mask: np.ndarray, colour: str, scale: float, min_score: float) -> Found:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    bbox = tuple(float(v * scale) for v in (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
    stretched = _stretch(mask)
    scores = {name: float((stretched & t).sum() / (stretched | t).sum()) for name, t in _templates().items()}
    shape = max(scores, key=scores.get)
    aspect = (bbox[2] - bbox[0]) / (bbox[3] - bbox[1])
    named = scores[shape] >= min_score and 0.6 < aspect < 1.67
    return Found(colour, shape if named else "unknown", bbox, round(scores[shape], 3))
