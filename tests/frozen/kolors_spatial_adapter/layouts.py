"""Rows with boxes: from manifest records to what a micro-batch holds.

A row is {"file_path", "text", "width", "height", "objects": [{"phrase", "bbox": [x1, y1, x2, y2]}]}, boxes as shares
of the whole picture. Here they follow the picture's crop into its bucket, phrases become embeddings and tokens.
"""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from boxes import crop_box, largest_first, objects_problem
from diffusers.pipelines.kolors import ChatGLMTokenizer
from torch import Tensor
from torch.utils.data import Dataset

from common.cache import EmbeddingCache
from common.data import Place
from common.images import cover_box
from common.manifest import Record

IGNORE = -100  # behind a phrase's end
MAX_PHRASE_TOKENS = 31  # the captioning head says one more: the end


@dataclasses.dataclass(frozen=True)
class LayoutRow:
    """One row at its bucket: where its encoded tensors are, and its boxes."""

    key: str  # of the picture and the caption in the cache
    phrase_keys: tuple[str, ...]  # of each object's phrase
    boxes: tuple[tuple[float, ...], ...]  # in the cropped picture
    phrase_ids: tuple[tuple[int, ...], ...]  # indices into the vocabulary, the end among them
    add_time_ids: tuple[int, ...]


def with_problems(records: Sequence[Record]) -> list[Record]:
    """The records; what is wrong with a row's objects becomes its problem, which check_records reports."""
    problems = [record.problem or objects_problem(record.extra.get("objects")) for record in records]
    return [dataclasses.replace(record, problem=found) for record, found in zip(records, problems, strict=True)]


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


class LayoutSamples(Dataset):
    """Rows as a dataset for MicroBatchSampler: encoded tensors, boxes in `slots` places, and where in the step.

    latents (4, h, w) and, with flips, latents_flipped; prompt_embeds (L, D), pooled_prompt_embeds (D,); phrases
    (slots, D), boxes (slots, 4), has_box (slots,), phrase_ids (slots, T); add_time_ids (6,); row, its number.
    """

    def __init__(self, cache: EmbeddingCache, rows: Sequence[LayoutRow], slots: int):
        self.cache, self.rows, self.slots = cache, list(rows), slots
        self.tokens = max((len(ids) for row in rows for ids in row.phrase_ids), default=1)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: Place) -> dict:
        return {**self.sample(place.sample), "step": place.step, "position": place.position}

    def sample(self, number: int) -> dict[str, Tensor]:
        """The tensors of one row."""
        row = self.rows[number]
        encoded = self.cache[row.key]
        count, width = len(row.boxes), encoded["prompt_embeds"].shape[-1]
        phrases, boxes = torch.zeros(self.slots, width), torch.zeros(self.slots, 4)
        phrase_ids = torch.full((self.slots, self.tokens), IGNORE)
        for slot, (key, box, ids) in enumerate(zip(row.phrase_keys, row.boxes, row.phrase_ids, strict=True)):
            phrases[slot], boxes[slot] = self.cache[key]["phrase_embed"], torch.tensor(box)
            phrase_ids[slot, : len(ids)] = torch.tensor(ids)
        return {
            **encoded,
            "phrases": phrases,
            "boxes": boxes,
            "has_box": torch.arange(self.slots) < count,
            "phrase_ids": phrase_ids,
            "add_time_ids": torch.tensor(row.add_time_ids),
            "rows": torch.tensor(number),
        }


class RandomLayouts(Dataset):
    """Random samples of the benchmark's size, in place of encoded data."""

    def __init__(self, side: int, prompt_tokens: int, prompt_width: int, slots: int, vocabulary_size: int):
        self.side, self.prompt, self.slots = side, (prompt_tokens, prompt_width), slots
        self.vocabulary_size = vocabulary_size

    def __len__(self) -> int:
        return 64

    def __getitem__(self, place: Place) -> dict:
        rng = torch.Generator().manual_seed(place.sample)
        corners = torch.rand(self.slots, 2, generator=rng) * 0.7
        pixels = self.side * 8
        return {
            "latents": torch.randn(4, self.side, self.side, generator=rng),
            "prompt_embeds": torch.randn(*self.prompt, generator=rng, dtype=torch.bfloat16),
            "pooled_prompt_embeds": torch.randn(self.prompt[1], generator=rng, dtype=torch.bfloat16),
            "phrases": torch.randn(self.slots, self.prompt[1], generator=rng),
            "boxes": torch.cat([corners, corners + 0.25], dim=1),
            "has_box": torch.arange(self.slots) < self.slots // 2,
            "phrase_ids": torch.randint(self.vocabulary_size, (self.slots, 8), generator=rng),
            "add_time_ids": torch.tensor([pixels, pixels, 0, 0, pixels, pixels]),
            "rows": torch.tensor(place.sample),
            "step": place.step,
            "position": place.position,
        }


def collate(samples: list[dict]) -> dict:
    """One micro-batch: every tensor with a batch axis in front, and each sample's place in the step."""
    names = [name for name in samples[0] if name not in ("step", "position")]
    batch = {name: torch.stack([sample[name] for sample in samples]) for name in names}
    return {**batch, "step": samples[0]["step"], "positions": [sample["position"] for sample in samples]}


def read_layouts(path: Path) -> list[dict]:
    """The rows {"text", "objects"} of a JSONL file. ValueError names the line that cannot be used."""
    if not path.is_file():
        raise ValueError(f"no layouts in {path}; expected a JSONL file of rows with text and objects")
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path.name} line {number}: not valid JSON: {error}") from error
        problem = objects_problem(row.get("objects")) if isinstance(row, dict) else "expected an object"
        if not problem and not isinstance(row.get("text"), str):
            problem = f"text is {row.get('text')!r}, expected a caption"
        if problem:
            raise ValueError(f"{path.name} line {number}: {problem}")
        rows.append(row)
    return rows
