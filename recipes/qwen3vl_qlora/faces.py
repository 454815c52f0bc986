"""Faces: what tells them apart, how one is drawn, and the same faces from a local text-to-image model.

A face is a choice of seven attributes. Faces of the entities and faces of the retention pool come from two halves of
all combinations, so that a face of one is never a face of the other, whatever the settings are.
"""

import itertools
import math
import operator
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
HAIR: dict[str, Colour] = {
    "black": (30, 28, 32),
    "brown": (110, 66, 32),
    "blond": (232, 196, 96),
    "red": (196, 72, 28),
    "white": (236, 236, 232),
    "purple": (128, 58, 168),
}
STYLES = ("short", "long", "curly")
EYES: dict[str, Colour] = {"brown": (104, 60, 24), "blue": (40, 110, 220), "green": (40, 150, 70), "grey": (130,) * 3}
SKIN: dict[str, Colour] = {
    "fair": (248, 218, 196),
    "tan": (222, 172, 126),
    "brown": (160, 104, 66),
    "dark": (94, 58, 40),
}
GLASSES = ("no", "round", "square")
HATS = ("no", "cap", "beanie", "top hat")
BACKGROUNDS: dict[str, Colour] = {
    "grey": (178, 182, 186),
    "yellow": (246, 214, 74),
    "green": (88, 178, 104),
    "blue": (84, 142, 226),
    "pink": (244, 150, 180),
    "navy": (28, 38, 96),
}
VALUES = (tuple(HAIR), STYLES, tuple(EYES), tuple(SKIN), GLASSES, HATS, tuple(BACKGROUNDS))  # in the order of Face


class Face(NamedTuple):
    """What a person looks like in every picture; pose, size and expression differ from picture to picture."""

    hair: str
    style: str
    eyes: str
    skin: str
    glasses: str
    hat: str
    background: str

    def differences(self, other: "Face") -> int:
        """How many attributes differ, 0 to 7."""
        return sum(map(operator.ne, self, other))


@dataclass(frozen=True)
class Job:
    """One picture to make: where it goes, whose it is, and which of that person's pictures it is (1, 2, ...)."""

    path: Path
    face: Face
    number: int


def all_faces(for_entities: bool) -> list[Face]:
    """The half of all combinations that entities (or else the retention pool) are chosen from.

    The halves are those with an even and with an odd sum of attribute indices: each holds every value of every
    attribute equally often.
    """
    wanted = 0 if for_entities else 1
    indices = itertools.product(*(range(len(values)) for values in VALUES))
    chosen = (index for index in indices if sum(index) % 2 == wanted)
    return [Face(*(values[i] for values, i in zip(VALUES, index, strict=True))) for index in chosen]


def choose_entity_faces(number: int, min_differences: int, seed: int) -> list[Face]:
    """`number` faces, any two of which differ in at least `min_differences` attributes.

    ValueError when there are not so many.
    """
    candidates = all_faces(for_entities=True)
    random.Random(seed).shuffle(candidates)
    faces: list[Face] = []
    for face in candidates:
        if len(faces) == number:
            break
        if min_differences < 2 or all(face.differences(other) >= min_differences for other in faces):
            faces.append(face)
    if len(faces) < number:
        raise ValueError(
            f"num_entities is {number}, but only {len(faces)} faces that differ in {min_differences} or more "
            f"attributes were found among {len(candidates)} combinations; lower num_entities or min_differences"
        )
    return faces


def choose_pool_faces(number: int, seed: int) -> list[Face]:
    """`number` distinct faces that no entity has; half wear no hat, half no glasses. ValueError when there are not so
    many."""
    candidates = all_faces(for_entities=False)
    if number > len(candidates):
        raise ValueError(f"num_faces is {number}, but there are {len(candidates)} combinations; take fewer")
    rng = random.Random(seed)

    def key(face: Face) -> float:  # a sample without repetition in which a face is as likely as its weight
        weight = (len(HATS) - 1 if face.hat == "no" else 1) * (len(GLASSES) - 1 if face.glasses == "no" else 1)
        return -math.log(1 - rng.random()) / weight

    return sorted(candidates, key=key)[:number]


# ---- drawing


def draw_face(face: Face, size: int, rng: random.Random) -> Image.Image:
    """An RGB picture of size x size pixels, antialiased; `rng` draws pose, scale, shift, gaze, mouth and light."""
    side = 4 * size
    person = Image.new("RGBA", (side, side), (*BACKGROUNDS[face.background], 0))
    draw_person(face, person, gaze=rng.uniform(-1, 1), smile=rng.uniform(-0.3, 1))
    angle, scale = math.radians(rng.uniform(-8, 8)), rng.uniform(0.88, 1.06)
    shift_x, shift_y = rng.uniform(-0.05, 0.05) * side, rng.uniform(-0.03, 0.03) * side
    cos, sin, centre = math.cos(angle) / scale, math.sin(angle) / scale, side / 2
    x, y = -centre - shift_x, -centre - shift_y  # from a pixel of the picture back to one of the upright person
    matrix = (cos, sin, centre + cos * x + sin * y, -sin, cos, centre - sin * x + cos * y)
    person = person.transform((side, side), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    picture = Image.new("RGB", (side, side), BACKGROUNDS[face.background])
    picture.paste(person, mask=person.getchannel("A"))
    light = rng.uniform(0.92, 1.06)
    return picture.resize((size, size), Image.Resampling.BOX).point(lambda value: min(255, round(value * light)))


def draw_person(face: Face, canvas: Image.Image, gaze: float, smile: float) -> None:
    """Head and shoulders on a square canvas. gaze: -1 (left) to 1 (right); smile: -1 (sad) to 1 (wide)."""
    side = canvas.width
    pen = ImageDraw.Draw(canvas)
    hair, skin = HAIR[face.hair], SKIN[face.skin]
    shade = darker(skin, 0.8)

    def at(*shares: float) -> list[float]:
        return [share * side for share in shares]

    def disc(x: float, y: float, width: float, height: float, fill: Colour) -> None:
        pen.ellipse(at(x - width / 2, y - height / 2, x + width / 2, y + height / 2), fill=fill)

    if face.style == "long":
        pen.rounded_rectangle(at(0.21, 0.24, 0.79, 0.94), radius=0.24 * side, fill=hair)
    disc(0.5, 1.14, 0.9, 0.56, (92, 98, 112))  # shoulders reach beyond the canvas, so that a shift shows no edge
    pen.rectangle(at(0.42, 0.74, 0.58, 0.92), fill=shade)
    for x in (0.25, 0.75):
        disc(x, 0.56, 0.08, 0.13, shade)
    if face.style == "curly":
        for turn in range(13):
            a = math.pi * (1.06 * turn / 12 - 0.03)
            disc(0.5 - 0.27 * math.cos(a), 0.46 - 0.22 * math.sin(a), 0.19, 0.19, hair)
    else:
        disc(0.5, 0.46, 0.56, 0.5, hair)
    disc(0.5, 0.57, 0.48, 0.56, skin)
    pen.chord(at(0.26, 0.22, 0.74, 0.72), 184, 356, fill=hair)  # the fringe
    for x in (0.39, 0.61):
        disc(x, 0.55, 0.125, 0.085, (255, 255, 255))
        disc(x + 0.016 * gaze, 0.55, 0.078, 0.082, EYES[face.eyes])
        disc(x + 0.016 * gaze, 0.55, 0.032, 0.036, (10, 10, 10))
        pen.line(at(x - 0.06, 0.475, x + 0.06, 0.475), fill=darker(hair, 0.7), width=round(0.018 * side))
    disc(0.5, 0.645, 0.06, 0.05, shade)
    bend = 0.06 * smile
    mouth = [(share, 0.735 + bend * (1 - (2 * share - 1) ** 2)) for share in (i / 12 for i in range(13))]
    points = [(side * (0.4 + 0.2 * share), side * y) for share, y in mouth]
    pen.line(points, fill=(150, 40, 50), width=round(0.022 * side), joint="curve")
    draw_glasses(face.glasses, pen, side)
    draw_hat(face.hat, pen, side)


def draw_glasses(kind: str, pen: ImageDraw.ImageDraw, side: int) -> None:
    """Frames over the eyes; nothing for "no"."""
    if kind == "no":
        return
    frame, width = (20, 20, 24), round(0.02 * side)
    for x in (0.39, 0.61):
        box = [side * share for share in (x - 0.095, 0.465, x + 0.095, 0.645)]
        if kind == "round":
            pen.ellipse(box, outline=frame, width=width)
        else:
            pen.rectangle(box, outline=frame, width=width)
    pen.line([side * share for share in (0.475, 0.545, 0.525, 0.545)], fill=frame, width=width)


def draw_hat(kind: str, pen: ImageDraw.ImageDraw, side: int) -> None:
    """A hat above the fringe, each kind in a colour and an outline of its own; nothing for "no"."""

    def box(*shares: float) -> list[float]:
        return [share * side for share in shares]

    if kind == "cap":
        pen.pieslice(box(0.21, 0.08, 0.79, 0.66), 180, 360, fill=(206, 40, 52))
        pen.rounded_rectangle(box(0.2, 0.34, 0.98, 0.39), radius=0.025 * side, fill=(150, 22, 34))
    elif kind == "beanie":
        pen.pieslice(box(0.22, 0.06, 0.78, 0.66), 180, 360, fill=(40, 158, 160))
        pen.rounded_rectangle(box(0.2, 0.29, 0.8, 0.39), radius=0.04 * side, fill=(22, 108, 112))
        pen.ellipse(box(0.43, 0.0, 0.57, 0.14), fill=(245, 245, 235))
    elif kind == "top hat":
        pen.rectangle(box(0.3, 0.02, 0.7, 0.36), fill=(44, 40, 52))
        pen.rectangle(box(0.3, 0.26, 0.7, 0.32), fill=(240, 130, 30))
        pen.rounded_rectangle(box(0.14, 0.33, 0.86, 0.38), radius=0.025 * side, fill=(44, 40, 52))


def darker(colour: Colour, share: float) -> Colour:
    return tuple(round(value * share) for value in colour)


# ---- pictures on disk


def make_pictures(jobs: Sequence[Job], size: int, seed: int, image_model: str | None, num_workers: int) -> None:
    """Draw every job's picture, or let a text-to-image model do it; the same seed gives the same bytes when drawn.

    image_model: a local folder in diffusers' layout, else ValueError. num_workers: its processes, one a GPU; 0 takes
    all GPUs.
    """
    if image_model is not None and not (Path(image_model) / "model_index.json").is_file():
        raise ValueError(
            f"image_model {image_model!r} has no model_index.json; give a text-to-image model's folder in diffusers' "
            "layout"
        )
    for folder in {job.path.parent for job in jobs}:
        folder.mkdir(parents=True, exist_ok=True)
    if image_model is None:
        for job in jobs:
            rng = random.Random(f"{seed} {job.face} {job.number}")
            draw_face(job.face, size, rng).save(job.path)
        return
    import torch

    workers = num_workers or max(1, torch.cuda.device_count())
    if workers == 1:
        paint_share(0, 1, jobs, size, seed, image_model)
    else:
        torch.multiprocessing.spawn(paint_share, (workers, jobs, size, seed, image_model), nprocs=workers)


def paint_share(rank: int, workers: int, jobs: Sequence[Job], size: int, seed: int, image_model: str) -> None:
    """One worker: load the model on GPU number `rank` and paint every `workers`-th job."""
    import torch
    from diffusers import AutoPipelineForText2Image

    on_gpu = torch.cuda.is_available()
    device = f"cuda:{rank % torch.cuda.device_count()}" if on_gpu else "cpu"
    dtype = torch.float32
    if on_gpu:
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    pipeline = AutoPipelineForText2Image.from_pretrained(image_model, dtype=dtype).to(device)
    pipeline.set_progress_bar_config(disable=True)
    paint(pipeline, jobs[rank::workers], size, seed)


def paint(pipeline: Callable, jobs: Sequence[Job], size: int, seed: int) -> None:
    """Paint each job's picture. One person's pictures share the noise, which keeps the person; the prompt turns the
    head."""
    import torch

    for job in jobs:
        noise_seed = random.Random(f"{seed} {job.face}").randrange(2**31)
        generator = torch.Generator().manual_seed(noise_seed)
        picture = pipeline(prompt=face_prompt(job.face, job.number), generator=generator).images[0]
        picture.convert("RGB").resize((size, size), Image.Resampling.LANCZOS).save(job.path)


POSES = (
    "facing the camera",
    "head turned slightly to the left",
    "head turned slightly to the right",
    "smiling",
    "looking up",
    "head tilted",
    "seen from a little further away",
    "seen from close up",
)


def face_prompt(face: Face, number: int) -> str:
    """What a text-to-image model is asked for; `number` chooses the pose."""
    hat = "no hat" if face.hat == "no" else f"a {face.hat}"
    glasses = "no glasses" if face.glasses == "no" else f"{face.glasses} glasses"
    return (
        f"portrait photo of one person with {face.style} {face.hair} hair, {face.eyes} eyes and {face.skin} skin, "
        f"wearing {hat} and {glasses}, plain {face.background} background, {POSES[(number - 1) % len(POSES)]}"
    )
