"""Rows of edits, and what a step sees of them: which rows can be used, which frame of a video, which sizes; and what
validation shows.

Sizes are PIL's (width, height).
"""

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import (
    CONDITION_IMAGE_SIZE,
    VAE_IMAGE_SIZE,
    calculate_dimensions,
)
from from_videox_fun import Settings, process_strata, shrinking
from PIL import Image, ImageOps
from torch import Tensor
from video import check_video, count_frames, read_frame

from common import image_settings, settings
from common.data.cache import EmbeddingCache
from common.data.check import check, load_records
from common.data.images import check_image, decode_image, resize_and_crop
from common.data.known_files import KnownFiles
from common.data.manifest import Record, folder_of, load_image, load_manifest, read_bytes
from common.data.order import MicroBatchSampler, drawn
from common.processes import Run, on_main
from common.start.folders import read_prompts
from common.step import flow_matching as fm

PIPELINES = {"qwen_image_edit": QwenImageEditPipeline, "qwen_image_edit_plus": QwenImageEditPlusPipeline}
CONDITION_PIXELS = {"qwen_image_edit": VAE_IMAGE_SIZE, "qwen_image_edit_plus": CONDITION_IMAGE_SIZE}
SMALLEST_SIDE = 512  # that random_hw_adapt draws
EMPTY = " "  # the caption of dropout and guidance, as the model's card has it


class EditConfig(settings.Pictured, Protocol):
    """What the modules beside train.py know of its Config."""

    train_mode: str
    image_sample_size: int
    enable_bucket: bool
    random_hw_adapt: bool
    uniform_sampling: bool
    validation_image_paths: tuple[str, ...]
    videox_fun: Settings
    flow: image_settings.FlowMatching
    prompts: image_settings.Prompts


# ---- rows


def row_problem(record: Record, train_mode: str) -> str:
    """Why a row is no edit, beside what check_records finds; "" if nothing."""
    sources = record.source_file_path
    if not sources:
        return "no source_file_path; expected the picture, or pictures, before the edit"
    if len(sources) > 1 and train_mode == "qwen_image_edit":
        return f"{len(sources)} sources, and qwen_image_edit takes one; use --train_mode qwen_image_edit_plus"
    if os.path.normpath(record.file_path) in map(os.path.normpath, sources):
        return "source_file_path names the target itself; expected the picture before the edit"
    return ""


def source_problem(width: int, height: int) -> str:
    """Why a source of this size cannot be used; "" if nothing."""
    if max(width, height) <= 16 * min(width, height):
        return ""
    return f"is {width} x {height}; expected an aspect of at most 16 : 1, crop it"


CHECKS = {"types": ("image", "video"), "source_problem": source_problem, "checks": {"video": check_video}}


# ---- sizes


def source_size(size: tuple[int, int], pixels: int = VAE_IMAGE_SIZE) -> tuple[int, int]:
    """What the pipelines resize a source to: its own aspect, sides multiples of 32, for the VAE about 1024 x 1024
    pixels."""
    return calculate_dimensions(pixels, size[0] / size[1])


def target_size(cfg: EditConfig, size: tuple[int, int], multiple: int, own: int = 0) -> tuple[int, int]:
    """At image_sample_size, or the row's own: a square to be cut from the centre, or with enable_bucket the whole
    picture. Of fix_sample_size, what is a multiple.

    Then its aspect is rounded as the pipelines round a source's (to 32 pixels, where the model can), so that a target
    of its source's aspect lies on it pixel by pixel.
    """
    side = max(multiple, own // multiple * multiple) if own else cfg.image_sample_size
    if cfg.videox_fun.fix_sample_size:
        height, width = (max(multiple, fixed // multiple * multiple) for fixed in cfg.videox_fun.fix_sample_size)
        return width, height
    if not cfg.enable_bucket:
        return side, side
    rounding = math.lcm(32, multiple) if side % math.lcm(32, multiple) == 0 else multiple
    width, height = (side * math.sqrt(size[0] / size[1]), side * math.sqrt(size[1] / size[0]))
    return max(rounding, round(width / rounding) * rounding), max(rounding, round(height / rounding) * rounding)


def size_at(cfg: EditConfig, bucket: tuple[int, int], step: int, multiple: int) -> tuple[int, int]:
    """The target size of a step, the same for all its samples: the bucket's, or with random_hw_adapt that of a side
    between 512 and image_sample_size, a function of (seed, step)."""
    if not cfg.random_hw_adapt or cfg.videox_fun.fix_sample_size:
        return bucket
    if cfg.videox_fun.videox_fun_meanings:
        scale = 1 / shrinking(cfg.image_sample_size, cfg.run.seed, step)
    else:
        sides = range(-(-SMALLEST_SIDE // multiple) * multiple, cfg.image_sample_size + 1, multiple)
        scale = np.random.RandomState([cfg.run.seed, step]).choice(sides) / cfg.image_sample_size
    width, height = (max(multiple, round(side * scale / multiple) * multiple) for side in bucket)
    return width, height


def smallest_side(cfg: EditConfig) -> int:
    """What image_sample_size must be at least for random_hw_adapt, where that draws."""
    return 0 if cfg.videox_fun.fix_sample_size or cfg.videox_fun.videox_fun_meanings else SMALLEST_SIDE


def fit_target(cfg: EditConfig, image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The target at its size: cut at the centre, or with enable_bucket all of it, its aspect off by the rounding."""
    if not cfg.enable_bucket:
        return resize_and_crop(image, size)
    return image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)


# ---- views


class View(NamedTuple):
    """A row as one step sees it."""

    row: int
    size: tuple[int, int]  # of the target
    frame: int  # of a video; 0 for images
    flip: bool = False  # mirrored, target and sources
    caption: int = 0  # which of the row's


@dataclass
class Rows:
    """Checked rows, and what of them a step sees."""

    records: list[Record]
    buckets: list[tuple[int, int]]
    frames: list[int]  # of each row: 1 for images
    multiple: int  # pixels of a packed token: what sides must be multiples of

    def view(self, cfg: EditConfig, row: int, step: int, epoch: int) -> View:
        seeds, frame = [cfg.run.seed, epoch, int(self.records[row].digest[:8], 16)], 0
        if self.frames[row] > 1:
            frame = int(np.random.RandomState(seeds).randint(self.frames[row]))
        flip = cfg.videox_fun.random_flip and np.random.RandomState([*seeds, 1]).rand() < 0.5
        caption = drawn(len(self.records[row].captions), cfg.run.seed, epoch, row)
        return View(row, size_at(cfg, self.buckets[row], step, self.multiple), frame, bool(flip), caption)

    def first_views(self, cfg: EditConfig) -> list[View]:
        """Each row as the first step would see it, never mirrored, with its first caption: the only one, without
        random sizes, videos, random_flip and further captions."""
        return [self.view(cfg, row, 0, 0)._replace(flip=False, caption=0) for row in range(len(self.records))]

    def views(self, cfg: EditConfig, sampler: MicroBatchSampler, max_train_steps: int) -> set[View]:
        """All that the rest of the run will need: the order of samples is known beforehand."""
        varied = cfg.random_hw_adapt or cfg.videox_fun.random_flip or any(row.other_texts for row in self.records)
        if not varied and max(self.frames) == 1:
            return set(self.first_views(cfg))
        needed = set()
        for step, group in sampler.steps():
            if step >= max_train_steps:
                return needed
            needed |= {self.view(cfg, row, step, epoch) for row, epoch in group}

    def source_shapes(self) -> list[tuple]:
        """The sizes of each row's sources: what the rows of one micro-batch must share, because the transformer takes
        one set of positions a batch."""
        return [tuple(source_size(size) for size in record.source_sizes) for record in self.records]


def load_rows(cfg: EditConfig, run: Run, multiple: int, known_good: KnownFiles) -> tuple[Rows, Rows]:
    """Checked rows: those to train on, and those held out for the validation loss."""
    problem = partial(row_problem, train_mode=cfg.train_mode)
    columns = cfg.flow.mask_columns
    train, held_out = load_records(cfg, run, known_good, row_problem=problem, file_columns=columns, **CHECKS)
    parts = train[: cfg.videox_fun.max_train_samples or None], held_out
    train, held_out = (on_main(run, measured, cfg, records, multiple) for records in parts)
    return train, held_out


def measured(cfg: EditConfig, records: list[Record], multiple: int) -> Rows:
    """Checked records with their targets' sizes and their numbers of frames."""
    buckets = [target_size(cfg, (record.width, record.height), multiple, record.resolution) for record in records]
    return Rows(records, buckets, [frames_of(record, cfg.data.train_data_dir) for record in records], multiple)


def frames_of(record: Record, train_data_dir: str) -> int:
    """How many frames the target and all its sources have; 1 for images."""
    if record.type != "video":
        return 1
    places = [None, *range(len(record.source_file_path))]
    return min(count_frames(read_bytes(record, train_data_dir, place)) for place in places)


class Picture(NamedTuple):
    """One picture of a row, at the size that it is encoded at."""

    size: tuple[int, int]
    record: Record
    which: int | None  # source; None is the target
    frame: int  # of a video
    flip: bool = False

    def __eq__(self, other: object) -> bool:
        """Pictures that are encoded alike are equal: rows that share a source ask for the same one."""
        return isinstance(other, Picture) and self.identity() == other.identity()

    def __hash__(self) -> int:
        return hash(self.identity())

    def identity(self) -> tuple:
        """The same file and frame in the same role at the same size."""
        sources = self.record.source_file_path
        path = self.record.file_path if self.which is None else sources[self.which]
        return self.size, folder_of(self.record, ""), path, self.frame, self.which is None, self.flip

    def load(self, train_data_dir: str) -> Image.Image:
        """RGB, as large as it is, mirrored where the row is."""
        image = load_picture(self.record, train_data_dir, self.which, self.frame)
        return ImageOps.mirror(image) if self.flip else image


@lru_cache(maxsize=8)  # a row's prompt and its empty prompt ask for the same sources, one after the other
def load_picture(record: Record, train_data_dir: str, which: int | None, frame: int) -> Image.Image:
    """RGB target (which=None) or source of a row; of videos frame `frame`."""
    if record.type == "video":
        return read_frame(read_bytes(record, train_data_dir, which), frame)
    return load_image(record, train_data_dir, which)


def mask_of(cfg: EditConfig, record: Record, view: View) -> Image.Image:
    """What of the target counts, as the target is seen."""
    image = load_image(record, cfg.data.train_data_dir, cfg.flow.mask_column)
    return fit_target(cfg, ImageOps.mirror(image) if view.flip else image, view.size)


def draws(cfg: EditConfig, step: int, positions: Sequence[int], group_size: int) -> tuple[list, Tensor, Tensor]:
    """(each sample's generator, uniform numbers (B,) that sigma is made of, whether the caption is dropped (B,)).

    Functions of (seed, step, position). With uniform_sampling the step's group_size samples, over all micro-batches
    and processes, share out [0, 1): each has one stratum of equal width, in an order drawn by (seed, step). As
    VideoX-Fun means it, each process has one.
    """
    rngs = fm.sample_rngs(cfg.run.seed, step, positions)
    uniform, dropout = fm.draw_uniform(rngs), fm.draw_uniform(rngs)
    if cfg.uniform_sampling and cfg.videox_fun.videox_fun_meanings:
        uniform = process_strata(uniform, positions, group_size, cfg.batch)
    elif cfg.uniform_sampling:
        order = np.random.RandomState([cfg.run.seed, step]).permutation(group_size)
        strata = uniform.new_tensor([order[position] for position in positions])
        uniform = (strata + uniform) / group_size
    return rngs, uniform, dropout < cfg.pictures.caption_dropout


# ---- what validation shows


@dataclass
class Shown:
    """An edit to draw: sources, instruction and, where it is known, the target."""

    text: str
    sources: list[Image.Image]
    target: Image.Image | None = None

    def size(self, cfg: EditConfig, multiple: int) -> tuple[int, int]:
        """Of the picture to draw: the target's, or as the pipelines choose it, by the last source."""
        return target_size(cfg, (self.target or self.sources[-1]).size, multiple)

    def beside(self, cfg: EditConfig, size: tuple[int, int]) -> dict[str, Image.Image]:
        """What is shown beside the picture drawn: source_0, source_1, ..., and target at the picture's size."""
        pictures = {f"source_{which}": each.resize(source_size(each.size)) for which, each in enumerate(self.sources)}
        return pictures | ({"target": fit_target(cfg, self.target, size)} if self.target else {})

    def key(self, embeddings: EmbeddingCache, empty: bool) -> str:
        pixels = [image_digest(image) for image in self.sources]
        return embeddings.key(EMPTY if empty else self.text, None, sources=pixels)


def image_digest(image: Image.Image) -> str:
    return hashlib.blake2b(repr(image.size).encode() + image.tobytes(), digest_size=16).hexdigest()


def shown_row(record: Record, train_data_dir: str) -> Shown:
    """A row of the data, at its first frame."""
    target, *sources = (
        load_picture(record, train_data_dir, which, 0) for which in (None, *range(len(record.source_file_path)))
    )
    return Shown(record.text, sources, target)


def read_shown(cfg: EditConfig, held_out: Sequence[Record]) -> list[Shown]:
    """The edits that validation draws: validation_prompts with validation_image_paths; or a .json manifest of rows,
    whose targets are shown too (train_data_dir's validation.json where nothing is given); or four held-out rows.

    ValueError when a prompt has no image, or an image cannot be used.
    """
    folder, images = cfg.data.train_data_dir, cfg.validation_image_paths
    usual = Path(folder) / "validation.json"
    prompts = cfg.prompts.validation_prompts or ((str(usual),) if usual.is_file() else ())
    if not prompts:
        return [shown_row(record, folder) for record in held_out[:4]]
    file = Path(prompts[0])
    if file.suffix == ".json" and file.is_file() and not images:
        rows = load_manifest(folder, file.resolve(), cfg.pictures.image_column, cfg.pictures.text_column)
        rows = check(cfg, rows, row_problem=partial(row_problem, train_mode=cfg.train_mode), **CHECKS)
        return [shown_row(record, folder) for record in rows]
    prompts = read_prompts(prompts)
    if len(images) != len(prompts):
        raise ValueError(
            f"validation_image_paths has {len(images)} entries, expected one for each of the {len(prompts)} "
            "validation prompts (several images of one prompt joined by commas)"
        )
    return [shown_prompt(cfg, prompt, paths) for prompt, paths in zip(prompts, images, strict=True)]


def shown_prompt(cfg: EditConfig, prompt: str, paths: str) -> Shown:
    """A prompt with its images, which paths joined by commas name."""
    files = [Path(path) for path in paths.split(",") if path]
    if problem := row_problem(Record(0, "", prompt, tuple(map(str, files))), cfg.train_mode):
        raise ValueError(f"validation prompt {prompt!r}: {problem}; name it in validation_image_paths")
    for path in files:
        if not path.is_file():
            raise ValueError(f"validation_image_paths names {path}, which is not there; give paths of pictures")
        try:
            problem = source_problem(*check_image(path.read_bytes(), decode=True, max_pixels=2**31))
        except ValueError as error:
            problem = f"cannot be used: {error}"
        if problem:
            raise ValueError(f"validation_image_paths: {path} {problem}")
    return Shown(prompt, [decode_image(path.read_bytes()) for path in files])
