"""Rows with boxes: from manifest records to what a micro-batch holds.

A row is {"file_path", "text", "width", "height", "objects": [{"phrase", "bbox": [x1, y1, x2, y2]}]}, boxes as shares
of the whole picture. Here they follow the picture's crop into its bucket, phrases become embeddings and tokens.
"""

import dataclasses
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from boxes import crop_box, largest_first, objects_problem
from diffusers.pipelines.kolors import ChatGLMTokenizer
from torch import Tensor
from torch.utils.data import Dataset

from common import settings
from common.data.cache import EmbeddingCache
from common.data.images import cover_box
from common.data.json_rows import json_rows, parse_json, short
from common.data.loader import of_place
from common.data.manifest import Record
from common.data.order import Place
from common.data.row_files import read_file
from common.step import flow_matching as fm

IGNORE = -100  # behind a phrase's end
MAX_PHRASE_TOKENS = 31  # the captioning head says one more: the end
LABELLED = Path("data/layout_dataset.jsonl")  # what train_data_dir "layout" names, in the working directory


@dataclasses.dataclass(frozen=True)
class LayoutRow:
    """One row at its bucket: where its encoded tensors are, and its boxes."""

    key: str  # of the picture and the caption in the cache
    phrase_keys: tuple[str, ...]  # of each object's phrase
    boxes: tuple[tuple[float, ...], ...]  # in the cropped picture
    phrase_ids: tuple[tuple[int, ...], ...]  # indices into the vocabulary, the end among them
    add_time_ids: tuple[int, ...]
    picture: int  # the same for each sample of it: no negative of itself
    captions: tuple[str, ...] = ("",)  # keys of the row's captions, "" for the one in its own entry


def find_labelled(data: settings.Data) -> None:
    """Write into train_data_dir "layout" and train_data_meta what they stand for: LABELLED, or the manifest that is
    given, and the folder of pictures that was recorded with it. ValueError says what to run."""
    if data.train_data_dir != "layout":
        return
    manifest = Path(os.path.abspath(data.train_data_meta or LABELLED))
    meta = manifest.with_suffix(".meta.json")  # label_layouts.py's record of the folder
    lacks = [file for file in (manifest, meta) if not file.is_file()]
    if lacks:
        raise ValueError(
            f"train_data_dir layout needs {' and '.join(map(str, lacks))}: run label_layouts.py with --output_jsonl "
            f"{data.train_data_meta or LABELLED} in this working directory, or give the folder of pictures as "
            "--train_data_dir and the file of rows as --train_data_meta"
        )
    recorded = parse_json(read_file(meta))
    if not isinstance(recorded, dict) or not isinstance(recorded.get("train_data_dir"), str):
        raise ValueError(f"{meta} is {short(recorded)}, expected the train_data_dir that label_layouts.py recorded")
    data.train_data_dir = recorded["train_data_dir"]
    data.train_data_meta = str(manifest)


def row_problem(record: Record) -> str:
    """Why a row cannot be used, "" if it can."""
    return objects_problem(record.extra.get("objects"))


def phrases_of(rows: Iterable[dict]) -> Iterator[str]:
    return (item["phrase"] for row in rows for item in row["objects"])


def objects_in_bucket(record: Record, bucket: tuple[int, int], limit: int) -> list[dict]:
    """The record's objects as the picture shows them once it is cut to a bucket (width, height): boxes of the cropped
    picture, without what was cut away, the largest `limit` of them."""
    size = record.width, record.height
    left, top, right, bottom = cover_box(size, bucket)
    part = left / size[0], top / size[1], right / size[0], bottom / size[1]
    cropped = [{"phrase": item["phrase"], "bbox": crop_box(item["bbox"], part)} for item in record.extra["objects"]]
    return largest_first([item for item in cropped if item["bbox"]], limit)


def size_conditions(record: Record, bucket: tuple[int, int]) -> tuple[int, ...]:
    """The six numbers of the pipeline's add_time_ids: original (height, width), the crop's (top, left) in pixels of
    the resized picture, target (height, width). A mirrored picture has the same, since the crop is central."""
    left, top, right, _ = cover_box((record.width, record.height), bucket)
    scale = bucket[0] / (right - left)
    return record.height, record.width, round(top * scale), round(left * scale), bucket[1], bucket[0]


def phrase_tokens(tokenizer: ChatGLMTokenizer, phrase: str) -> list[int]:
    """A phrase's own tokens, without the two that the tokenizer puts in front."""
    return tokenizer(phrase)["input_ids"][len(tokenizer.get_prefix_tokens()) :][:MAX_PHRASE_TOKENS]


def build_vocabulary(tokenizer: ChatGLMTokenizer, phrases: Iterable[str]) -> list[int]:
    """The tokens that occur in phrases, sorted: the captioning head says an index into them, or their number, which
    is the end."""
    return sorted({token for phrase in set(phrases) for token in phrase_tokens(tokenizer, phrase)})


def index_phrases(
    tokenizer: ChatGLMTokenizer, phrases: Iterable[str], vocabulary: Sequence[int]
) -> dict[str, tuple[int, ...]]:
    """{phrase: indices into the vocabulary and the end}; tokens that are not in the vocabulary are left out."""
    place = {token: index for index, token in enumerate(vocabulary)}
    indices = {}
    for phrase in set(phrases):
        said = [place[token] for token in phrase_tokens(tokenizer, phrase) if token in place]
        indices[phrase] = (*said, len(vocabulary))
    return indices


def phrase_key(embeddings: EmbeddingCache, phrase: str) -> str:
    return embeddings.key(phrase, kind="phrase")


def layout_row(
    embeddings: EmbeddingCache,
    record: Record,
    bucket: tuple[int, int],
    indices: dict[str, tuple[int, ...]],
    limit: int,
    flipped: bool,
) -> LayoutRow:
    """A record at its bucket (width, height), with its `limit` largest objects; indices: see index_phrases; flipped:
    whether the mirrored picture is encoded too."""
    objects = objects_in_bucket(record, bucket, limit)
    return LayoutRow(
        key=embeddings.key(record, bucket, flipped=flipped),
        phrase_keys=tuple(phrase_key(embeddings, item["phrase"]) for item in objects),
        boxes=tuple(item["bbox"] for item in objects),
        phrase_ids=tuple(indices[item["phrase"]] for item in objects),
        add_time_ids=size_conditions(record, bucket),
        picture=int(record.digest[:15], 16),
        captions=("", *map(embeddings.key, record.other_texts)),
    )


def layout_to_draw(embeddings: EmbeddingCache, row: dict, limit: int) -> dict:
    """A row {"text", "objects"}, with the encodings of its caption and of the phrases of its `limit` largest
    objects."""
    objects = largest_first(row["objects"], limit)
    phrase_embeds = [embeddings[phrase_key(embeddings, item["phrase"])]["phrase_embed"] for item in objects]
    caption = embeddings[embeddings.key(row["text"])]
    return {"text": row["text"], "objects": objects, "phrase_embeds": phrase_embeds, **caption}


class LayoutSamples(Dataset):
    """Rows as a dataset for MicroBatchSampler: encoded tensors, boxes in `slots` places, and where in the step.

    latents (4, h, w) and, with flips, latents_flipped; prompt_embeds (L, D), pooled_prompt_embeds (D,); phrases
    (slots, D), boxes (slots, 4), has_box (slots,), phrase_ids (slots, T); add_time_ids (6,); rows, the picture's.
    """

    def __init__(self, embeddings: EmbeddingCache, rows: Sequence[LayoutRow], slots: int):
        self.embeddings, self.rows, self.slots = embeddings, list(rows), slots
        self.tokens = max((len(ids) for row in rows for ids in row.phrase_ids), default=1)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: Place) -> dict:
        caption = place.draw(self.rows[place.sample].captions)
        other = self.embeddings[caption] if caption else {}
        return {**self.sample(place.sample), **other, **of_place(place)}

    def sample(self, number: int) -> dict[str, Tensor]:
        """The tensors of one row."""
        row = self.rows[number]
        encoded = self.embeddings[row.key]
        count, width = len(row.boxes), encoded["prompt_embeds"].shape[-1]
        phrases, boxes = torch.zeros(self.slots, width), torch.zeros(self.slots, 4)
        phrase_ids = torch.full((self.slots, self.tokens), IGNORE)
        for slot, (key, box, ids) in enumerate(zip(row.phrase_keys, row.boxes, row.phrase_ids, strict=True)):
            phrases[slot], boxes[slot] = self.embeddings[key]["phrase_embed"], torch.tensor(box)
            phrase_ids[slot, : len(ids)] = torch.tensor(ids)
        return {
            **encoded,
            "phrases": phrases,
            "boxes": boxes,
            "has_box": torch.arange(self.slots) < count,
            "phrase_ids": phrase_ids,
            "add_time_ids": torch.tensor(row.add_time_ids),
            "rows": torch.tensor(row.picture),
        }


def draws(seed: int, step: int, positions: Sequence[int]) -> tuple[list[torch.Generator], list[Tensor]]:
    """(each sample's generator, [timestep, caption dropout, grounding dropout, mirroring], each (B,) uniform numbers),
    functions of (seed, step, position)."""
    rngs = fm.sample_rngs(seed, step, positions)
    return rngs, [fm.draw_uniform(rngs) for _ in range(4)]


def read_layouts(path: Path) -> list[dict]:
    """The rows {"text", "objects"} of a JSONL file. ValueError names the line that cannot be used."""
    if not path.is_file():
        raise ValueError(f"no layouts in {path}; expected a JSONL file of rows with text and objects")
    rows = []
    for row, _, where in json_rows(path):
        problem = str(row) if isinstance(row, ValueError) else "" if isinstance(row, dict) else "expected an object"
        problem = problem or objects_problem(row.get("objects"))
        if not problem and not isinstance(row.get("text"), str):
            problem = f"text is {short(row.get('text'))}, expected a caption"
        if problem:
            raise ValueError(f"{where}: {problem}")
        rows.append(row)
    return rows
