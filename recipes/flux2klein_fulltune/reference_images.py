"""What concerns reference images alone: which ones the pipeline takes, at which size, whose they are."""

import math
from collections.abc import Sequence
from pathlib import Path

from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from PIL import Image
from torch import Tensor

from common.data.images import check_image, decode_image
from common.data.manifest import Record, load_image

MAX_PIXELS = 1024**2  # the pipeline shrinks larger ones to this area


def problem(width: int, height: int) -> str:
    """What the pipeline would refuse a reference image of this size for; "" if nothing."""
    if min(width, height) >= 64 and max(width, height) <= 8 * min(width, height):
        return ""
    return (
        f"is {width} x {height}; the pipeline takes sides of at least 64 pixels and an aspect of at most 8 : 1; "
        "crop or enlarge it"
    )


def encoded_size(width: int, height: int) -> tuple[int, int]:
    """(width, height) at which the pipeline encodes a reference: at most MAX_PIXELS, sides cut to 16s."""
    if width * height > MAX_PIXELS:
        scale = math.sqrt(MAX_PIXELS / (width * height))
        width, height = int(width * scale), int(height * scale)
    return width // 16 * 16, height // 16 * 16


def pixels(image: Image.Image, processor: Flux2ImageProcessor) -> Tensor:
    """(3, H, W) in [-1, 1], resized and cut by the pipeline's own processor."""
    width, height = encoded_size(*image.size)
    if image.width * image.height > MAX_PIXELS:
        image = processor._resize_to_target_area(image, MAX_PIXELS)
    return processor.preprocess(image, height=height, width=width, resize_mode="crop")[0]


def shapes(records: Sequence[Record]) -> list[tuple] | None:
    """The sizes of each row's references: what the rows of one micro-batch must share, because the transformer takes
    one set of positions a batch. None where no row has any."""
    sizes = [tuple(encoded_size(*size) for size in record.source_sizes) for record in records]
    return sizes if any(sizes) else None


def of_row(record: Record, train_data_dir: str | Path) -> list[Image.Image]:
    """A row's reference images in the manifest's order, at their own sizes."""
    return [load_image(record, train_data_dir, which=index) for index in range(len(record.source_file_path))]


def of_batch(batch: dict) -> list[Tensor]:
    """The encoded references of a micro-batch, (B, 128, h, w) each, in the manifest's order."""
    return [batch[f"reference_{index}"] for index in range(sum(name.startswith("reference_") for name in batch))]


def shown(
    prompts: Sequence[str], entries: Sequence[str], rows: Sequence[Record], train_data_dir: str | Path
) -> list[tuple[str, list[Image.Image]]]:
    """What validation draws: each prompt with its reference images, or without prompts the captions of these rows with
    theirs.

    entries: validation_image_paths. ValueError when there are not as many as prompts, or for an image that cannot be
    used.
    """
    if entries and len(entries) != len(prompts):
        raise ValueError(
            f"validation_image_paths has {len(entries)} entries, expected one for each of the {len(prompts)} "
            "validation prompts (several images of one prompt joined by commas, '' for none)"
        )
    if not prompts:
        return [(row.text, of_row(row, train_data_dir)) for row in rows]
    paths = [[Path(path) for path in entry.split(",") if path] for entry in entries or [""] * len(prompts)]
    return [(text, [_read(path) for path in of_text]) for text, of_text in zip(prompts, paths, strict=True)]


def _read(path: Path) -> Image.Image:
    if not path.is_file():
        raise ValueError(f"validation_image_paths names {path}, which is not there; give paths of pictures")
    try:
        wrong = problem(*check_image(path.read_bytes(), decode=True, max_pixels=2**31))
    except ValueError as error:
        wrong = f"cannot be used: {error}"
    if wrong:
        raise ValueError(f"validation_image_paths: {path} {wrong}")
    return decode_image(path.read_bytes())
