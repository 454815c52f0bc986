"""What concerns source images alone: which ones can be used, at which size the pipeline takes them, whose they are."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusers import QwenImage21Pipeline
from diffusers.pipelines.qwenimage21.pipeline_qwenimage21 import calculate_dimensions
from PIL import Image
from torch import Tensor, nn
from transformers import AutoProcessor

from common.data import loader
from common.data.images import image_to_tensor
from common.data.manifest import Record, load_image
from common.data.order import Place
from common.processes import Run
from common.settings import Pictured
from common.start import dry_run


def problem(width: int, height: int) -> str:
    """Why a source image of this size cannot be used, "" if it can."""
    return "" if max(width, height) <= 8 * min(width, height) else f"is {width} x {height}; expected 8 : 1 at most"


def row_problem(record: Record) -> str:
    """Why a row cannot be used, "" if it can: the text encoder sees sources together with one text."""
    several = record.source_file_path and record.other_texts
    return f"sources and {len(record.captions)} captions, expected one: give each a row of its own" if several else ""


CHECKS = {"row_problem": row_problem, "source_problem": problem}


def encoded_size(width: int, height: int, resolution: int) -> tuple[int, int]:
    """(width, height) at which the pipeline takes a source: about resolution squared pixels, sides multiples of 32."""
    return calculate_dimensions(resolution**2, width / height)[:2]


def shapes(records: Sequence[Record], resolution: int) -> list[tuple] | None:
    """The sizes of each row's sources: what the rows of one micro-batch must share, because the transformer takes one
    layout a batch. None where no row has any."""
    sizes = [tuple(encoded_size(*size, resolution) for size in record.source_sizes) for record in records]
    return sizes if any(sizes) else None


def of_row(record: Record, train_data_dir: str | Path, resolution: int) -> list[Image.Image]:
    """A row's source images as the pipeline resizes them, RGBA. The text encoder and the VAE see the same."""
    sources = []
    for which in range(len(record.source_file_path)):
        image = load_image(record, train_data_dir, which, keep_alpha=True).convert("RGBA")
        sources.append(image.resize(encoded_size(*image.size, resolution), Image.Resampling.LANCZOS))
    return sources


def read(record: Record, train_data_dir: str | Path, resolution: int) -> dict[str, Any]:
    """sources, the images, and of each source_0 (4, h, w) in [-1, 1] and so on."""
    sources = of_row(record, train_data_dir, resolution)
    return {"sources": sources} | {f"source_{which}": image_to_tensor(each) for which, each in enumerate(sources)}


def of_batch(batch: dict) -> list[Tensor]:
    """The encoded sources of a micro-batch, (B, 64, 1, h, w) each, in the manifest's order."""
    return [batch[f"source_{which}"] for which in range(sum(name.startswith("source_") for name in batch))]


# ---- a dry run


class Reader(dry_run.Reader):
    """With the norm that the pipeline reaches for inside its text encoder."""

    def __init__(self):
        super().__init__()
        self.model = nn.Module()
        self.model.norm = nn.Identity()


def sample_to_look_at(
    run: Run, cfg: Pictured, folder: Path, data: loader.Data, resolution: int, place: Place
) -> dry_run.Sample:
    """A row of the first micro-batch, its caption with its sources as the text encoder sees them."""
    sources = of_row(run.first_rows[place.sample], cfg.data.train_data_dir, resolution)
    processor = AutoProcessor.from_pretrained(folder / "processor")
    pipeline = dry_run.reading(QwenImage21Pipeline, processor=processor, text_encoder=Reader())

    def prompt(text: str) -> dry_run.Said:
        return dry_run.prompt_seen(processor.tokenizer, pipeline.encode_prompt, text, sources or None)

    return dry_run.sample_of_row(run, cfg, data, prompt, place)
