"""What a run sees before it takes a step: the first micro-batch as pictures and prompts, its tensors, its losses, and
what trains; on the screen, and in dry_run.html, one file that needs nothing else."""

import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from common.data import loader
from common.data.images import cover_box, resize_and_crop
from common.data.manifest import load_image
from common.data.order import MicroBatchSampler, Place
from common.processes import Run
from common.record.folder import write_atomically
from common.record.report_parts import img, page, section, table, text
from common.settings import Bucketed, Pictured, Shared
from common.step.flow_matching import errors_by_sigma

Said = list[tuple[str, bool]]  # pieces of a text, and whether each stands out

DRAWN = 512  # pixels of a picture
WRAPPERS = ("module", "base_model", "model")  # in a parameter's name, that say nothing
STYLE = """<style>
mark { background: #bfe3c8; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 480px), 1fr)); gap: 24px; }
h3 { margin: 0; }
</style>"""


class Captioned(Bucketed, Protocol):
    """What is read here of a Config whose prompts are captions."""

    max_sequence_length: int


@dataclass
class Sample:
    """A row of the first micro-batch, to be looked at."""

    title: str
    pictures: dict[str, Image.Image] = field(default_factory=dict)
    """by caption"""
    said: Said = field(default_factory=list)
    """its text as the model, or its text encoder, sees it; what has labels stands out"""
    text: str = ""
    """as it stands in the data"""


def set_apart(cfg: Shared) -> int:
    """The settings of a dry run, which is one process, begins anew, and writes beside the run; returns how many
    processes the run itself would have. ValueError under a launcher."""
    processes = int(os.environ.pop("WORLD_SIZE", 1))
    if "RANK" in os.environ and processes > 1:
        raise ValueError(f"dry_run is for one process, got {processes}; start it with run.sh, without a launcher")
    folder = Path(cfg.run.output_dir)
    if hasattr(cfg, "pictures"):
        cfg.pictures.cache_dir = cfg.pictures.cache_dir or str(folder / "embedding_cache")  # the run will read it too
    if hasattr(cfg, "lora") and not cfg.lora.lora_rank:
        # no step is taken: weights in what is computed in, and no state
        cfg.tuning.optimizer, cfg.tuning.ema_decay = "adafactor", 0.0
    cfg.run.output_dir = str(folder / "dry_run")
    Path(cfg.run.output_dir).mkdir(exist_ok=True)
    cfg.run.resume_from_checkpoint, cfg.batch.max_train_steps, cfg.batch.num_train_epochs = None, 1, 0
    return processes


# ---------------------------------------------------------------- what is looked at


class Seen(Exception):
    """What a text encoder was called with."""


class Reader(nn.Module):
    """Stands in a pipeline for its text encoder, and ends the encoding when it is called."""

    dtype, device = torch.float32, torch.device("cpu")

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **more: Any) -> None:
        raise Seen(input_ids[0][attention_mask[0].bool()].tolist(), int((attention_mask[0] == 0).sum()))


def reading(pipeline_class: Callable, **parts: Any) -> Any:
    """A pipeline of which only the text side is there: the tokenizer and other `parts`, and a Reader."""
    return pipeline_class(**dict.fromkeys(signature(pipeline_class).parameters) | {"text_encoder": Reader(), **parts})


def prompt_seen(tokenizer: Any, encode: Callable, *arguments: Any, **more: Any) -> Said:
    """The tokens that encode(...), a reading pipeline's, gives its text encoder, as text; padding is counted."""
    try:
        encode(*arguments, device=Reader.device, **more)
    except Seen as seen:
        ids, padding = seen.args
        return [(decoded(tokenizer, ids), False), (f"\n({len(ids)} tokens, {padding} more are padding)", False)]
    raise AssertionError("the text encoder was not called")


def decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    """Tokens as text, special ones too; a token that is repeated (a picture's) is shown once, with its number."""
    said, plain = [], []
    for token, repeated in itertools.groupby(ids):
        count = len(list(repeated))
        if count < 8:
            plain += [token] * count
        else:
            said += [tokenizer.decode(plain), f"{tokenizer.decode([token])} x {count} "]
            plain = []
    return "".join([*said, tokenizer.decode(plain)])


def sample_of_row(
    run: Run,
    cfg: Pictured,
    data: loader.Data,
    prompt: Callable[[str], Said],
    place: Place,
    file_columns: Sequence[str] = (),
) -> Sample:
    """A row of pictures with a caption: its picture as it lies and as it is cut to its bucket, its sources, and the
    pictures of file_columns. prompt(caption): see prompt_seen."""
    row, bucket, folder = run.first_rows[place.sample], data.bucket_ids[place.sample], cfg.data.train_data_dir
    image = load_image(row, folder)
    pictures = {
        f"{size_of(image)}, as it lies; outlined: what is used": outlined(image, bucket),
        f"cut to {bucket[0]} x {bucket[1]}": resize_and_crop(image, bucket),
    }
    for which in range(len(row.source_file_path)):
        source = load_image(row, folder, which)
        pictures[f"source {which + 1}, {size_of(source)}"] = source
    for column in file_columns:
        pictures[column] = resize_and_crop(load_image(row, folder, column), bucket)
    caption = place.draw(row.captions)
    return Sample(f"{row.file_path} ({row.where})", pictures, prompt(caption), caption)


def size_of(image: Image.Image) -> str:
    return f"{image.width} x {image.height}"


def outlined(image: Image.Image, bucket: tuple[int, int]) -> Image.Image:
    """A small copy of the picture, around the part of it that a bucket (width, height) shows."""
    small = image.copy()
    small.thumbnail((DRAWN, DRAWN))
    left, top, right, bottom = cover_box(small.size, bucket)
    width = max(1, max(small.size) // 128)
    ImageDraw.Draw(small).rectangle((left, top, right - 1, bottom - 1), outline="#e0301e", width=width)
    return small


def tensors_of(batch: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors; of a list, one for each sample."""
    for name, value in batch.items():
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, list) and value and isinstance(value[0], Tensor):
            yield from ((f"{name}[{index}]", each) for index, each in enumerate(value))


def describe_tensor(name: str, tensor: Tensor) -> list[str]:
    """Name, shape, dtype, least, most, mean, and how many values are no numbers."""
    shape, kind, values = str(tuple(tensor.shape)), str(tensor.dtype).removeprefix("torch."), tensor.double()
    finite = values[values.isfinite()]
    if not finite.numel():
        return [name, shape, kind, "", "", "", str(values.numel())]
    numbers = [f"{number.item():.4g}" for number in (finite.min(), finite.max(), finite.mean())]
    return [name, shape, kind, *numbers, str(values.numel() - finite.numel())]


def trained_parts(model: nn.Module) -> list[list[str]]:
    """[part, tensors that train, parameters that train, parameters]: numbered blocks are one part."""
    trains, tensors, all_parameters = Counter(), Counter(), Counter()
    for name, parameter in model.named_parameters():
        *path, _ = (word for word in name.split(".") if word not in WRAPPERS)
        part = ".".join("*" if word.isdigit() else word for word in path[:3]) or name
        numel = getattr(parameter, "quant_state", parameter).shape.numel()
        all_parameters[part] += numel
        trains[part] += numel * parameter.requires_grad
        tensors[part] += parameter.requires_grad
    all_parameters["all"], trains["all"], tensors["all"] = (each.total() for each in (all_parameters, trains, tensors))
    return [[part, f"{tensors[part]}", f"{trains[part]:,}", f"{count:,}"] for part, count in all_parameters.items()]


@torch.no_grad()
def losses_of(model: nn.Module, losses: Callable[[dict], dict[str, Tensor]], batch: dict) -> list[list[str]]:
    """[at what, mean, of each sample]"""
    model.eval()
    found = {name: each.float().cpu() for name, each in losses(batch).items()}
    return [[name, f"{each.mean():.4f}", *(f"{loss:.4f}" for loss in each)] for name, each in found.items()]


# ---------------------------------------------------------------- the page


def show(
    run: Run,
    cfg: Shared,
    data: loader.Data,
    sampler: MicroBatchSampler,
    model: nn.Module,
    losses: Callable[[dict], dict[str, Tensor]],
    sample: Callable[[Place], Sample],
    collate: Callable = loader.collate,
) -> None:
    """Print, and write to dry_run.html, what the first micro-batch is. losses(batch): (B,) of each sample, by
    what they are of; sample(place): how a row looks."""
    places = next(iter(sampler))
    batch = collate([data.dataset[place] for place in places])
    samples = [sample(place) for place in places]
    tables = {
        "Losses before training": (
            ["", "mean", *map(str, range(1, len(places) + 1))],
            losses_of(model, losses, batch),
        ),
        "Tensors of the micro-batch": (
            ["name", "shape", "dtype", "least", "most", "mean", "no numbers"],
            [describe_tensor(*each) for each in tensors_of(batch)],
        ),
        "What trains": (["part", "tensors that train", "parameters that train", "parameters"], trained_parts(model)),
    }
    for number, each in enumerate(samples, 1):
        run.print(f"\nsample {number}: {each.title}\n{''.join(piece for piece, _ in each.said)}")
    for title, (head, rows) in tables.items():
        run.print(f"\n{title}\n{aligned([head, *rows])}")
    name = f"{run.recipe_dir.name}: dry run"
    first = f"{len(places)} of the {sampler.group_size} samples of the first step; {len(data)} rows to train on"
    body = [STYLE, f'<h1>{text(name)}</h1><div class="quiet">{text(first)}</div>']
    sheet = "".join(f"<div><h3>Sample {number}</h3>{drawn(each)}</div>" for number, each in enumerate(samples, 1))
    body.append(section("The first micro-batch", f'<div class="samples">{sheet}</div>'))
    body += [
        section(title, table(head, rows, numbers=title != "Tensors of the micro-batch"))
        for title, (head, rows) in tables.items()
    ]
    file = Path(cfg.run.output_dir).parent / "dry_run.html"
    write_atomically(file, page(name, body))
    run.print(f"\nno step was taken; all of this with pictures: {file}")
    run.end()


def show_captioned(
    run: Run,
    cfg: Captioned,
    data: loader.Data,
    sampler: MicroBatchSampler,
    models: Any,
    sample_errors: Callable[..., Tensor],
    pipeline_class: Callable,
    tokenizer: Any,
) -> None:
    """show for flow matching on pictures whose caption is the whole prompt, as the pipeline encodes it."""
    encode = reading(pipeline_class, tokenizer=tokenizer).encode_prompt
    prompt = partial(prompt_seen, tokenizer, encode, max_sequence_length=cfg.max_sequence_length)
    losses = partial(errors_by_sigma, sample_errors, models, seed=cfg.run.seed, device=run.device)
    sample = partial(sample_of_row, run, cfg, data, prompt, file_columns=cfg.flow.mask_columns)
    show(run, cfg, data, sampler, models.transformer, losses, sample)


def drawn(sample: Sample) -> str:
    """A sample in HTML."""
    figures = "".join(
        f"<figure><div>{img(image, caption, DRAWN)}</div><figcaption>{text(caption)}</figcaption></figure>"
        for caption, image in sample.pictures.items()
    )
    said = "".join(f"<mark>{text(piece)}</mark>" if stands_out else text(piece) for piece, stands_out in sample.said)
    caption = f"<p>{text(sample.text)}</p>" if sample.text else ""
    return f'<p class="quiet">{text(sample.title)}</p>{caption}<div class="pictures">{figures}</div><pre>{said}</pre>'


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns of text."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
