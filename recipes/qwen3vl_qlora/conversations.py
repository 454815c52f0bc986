"""From JSONL rows to what the model sees: the check of every row, labels on the answer only, retention rows, padding.

A row is a conversation with images (see qa_rows.py); its last turn is the answer. Token tensors are (L,) for a row
and (B, L) for a micro-batch.
"""

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from foreign_rows import as_own
from PIL import Image
from qa_rows import part_texts, row_problem
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import Qwen3VLProcessor

from common import settings
from common.data.images import check_image, decode_image
from common.data.json_rows import json_rows
from common.data.loader import of_place
from common.data.manifest import inside_folder
from common.data.order import Place
from common.data.row_files import read_file
from common.progress import progress_bar, stage
from common.record.folder import append_row
from common.start import dry_run

IGNORE_INDEX = -100  # what cross_entropy leaves out
ANSWER_START, ANSWER_END = "<|im_start|>assistant\n", "<|im_end|>"


class RowSettings(Protocol):
    """What is read here of the recipe's Config, where each is explained."""

    task: str
    face_retention_pool: str | None
    object_retention_pool: str | None
    retention_ratio: float
    on_long_rows: str
    max_length: int
    max_validation_rows: int
    run: settings.Run
    data: settings.Data
    validation: settings.Validation


@dataclass
class Row:
    """One line of a JSONL file after the check: a conversation with its images, the last turn being the answer."""

    folder: str  # that `images` are relative to
    where: str  # "forward_train.jsonl line 7", for messages
    images: list[str]
    messages: list[dict]
    length: int = 0  # tokens, images included
    answer_tokens: int = 0  # tokens with a label
    digest: str = ""  # of the line and of the images' bytes
    problem: str = ""
    too_long: bool = False


def check_row(content: object, folder: Path, where: str, processor: Qwen3VLProcessor, max_length: int) -> Row:
    """Check one row, or the ValueError in its place; what is wrong with it goes into the row's `problem`."""
    row, tokenizer = Row(str(folder), where, [], []), processor.tokenizer
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    digest = hashlib.blake2b(json.dumps(content, ensure_ascii=False, default=str).encode(), digest_size=16)
    content = as_own(content)
    row.problem = row_problem(content, special)
    if row.problem:
        return row
    row.images, row.messages = content["images"], content["messages"]
    image_tokens = 0
    for name in row.images:
        try:
            data = read_file(inside_folder(folder, name))
            image_tokens += count_image_tokens(data, processor)
        except (OSError, ValueError) as error:
            reason = "missing" if isinstance(error, FileNotFoundError | NotADirectoryError) else error
            row.problem = f"{name[:200]}: {reason}"[:400]
            return row
        digest.update(data)
    input_ids = tokenizer(processor.apply_chat_template(row.messages, tokenize=False)).input_ids
    start, end = answer_span(input_ids, tokenizer)
    labelled = tokenizer.decode(input_ids[start:end]).removesuffix(ANSWER_END)
    if not labelled.strip().endswith("".join(part_texts(row.messages[-1])).strip()):
        row.problem = "the answer's tokens cannot be told from the template's; does it begin with a line break?"
        return row
    row.answer_tokens, row.length = end - start, len(input_ids) - len(row.images) + image_tokens
    row.digest, row.too_long = digest.hexdigest(), row.length > max_length
    if row.too_long:
        row.problem = f"{row.length} tokens ({image_tokens} of them images), max_length is {max_length}"
    return row


def count_image_tokens(data: bytes, processor: Qwen3VLProcessor) -> int:
    """The tokens of one picture. ValueError where it is damaged, or so narrow that the processor refuses it."""
    images = processor.image_processor
    width, height = check_image(data, decode=True, max_pixels=Image.MAX_IMAGE_PIXELS or 2**62)
    return images.get_number_of_image_patches(height, width, {}) // images.merge_size**2


def answer_span(input_ids: Sequence[int], tokenizer) -> tuple[int, int]:
    """(start, end) of the tokens with labels: what follows the last "<|im_start|>assistant\\n" up to its <|im_end|>,
    which is included.

    The whole sequence is looked for, and the last one is taken: "assistant", and even the sequence itself, may stand
    in a question.
    """
    marker = tokenizer(ANSWER_START, add_special_tokens=False).input_ids
    starts = [i for i in range(len(input_ids) - len(marker) + 1) if list(input_ids[i : i + len(marker)]) == marker]
    if not starts:  # the answer's own line break was merged into the marker's
        return 0, 0
    start = starts[-1] + len(marker)
    end = list(input_ids).index(tokenizer.convert_tokens_to_ids(ANSWER_END), start) + 1
    return start, end


def load_rows(cfg: RowSettings, file: Path, processor: Qwen3VLProcessor) -> list[Row]:
    """The good rows of a file. ValueError lists the bad ones, unless on_bad_rows or on_long_rows says to skip them."""
    if not file.is_file():
        there = ", ".join(sorted(path.name for path in file.parent.glob("*.jsonl"))) or "none"
        raise ValueError(f"no file {file}; JSONL files in that folder: {there}; generate_data.py writes them")
    found = list(json_rows(file))
    with stage("check", len(found)):
        seen = progress_bar(found, f"check {file.name}", unit="rows")
        rows = [check_row(content, file.parent, where, processor, cfg.max_length) for content, _, where in seen]
    if not rows:
        raise ValueError(f"{file} has zero rows; generate_data.py writes them")
    bad = [row for row in rows if row.problem]
    fatal = [row for row in bad if (cfg.on_long_rows if row.too_long else cfg.data.on_bad_rows) == "error"]
    if fatal or len(bad) == len(rows):
        flag = "--on_long_rows skip, or a larger --max_length" if fatal and fatal[0].too_long else "--on_bad_rows skip"
        listed = "".join(f"\n  {row.where}: {row.problem}" for row in (fatal or bad)[:20])
        raise ValueError(f"{len(bad)} of {len(rows)} rows of {file} cannot be used; mend them, or {flag}:{listed}")
    if bad:
        for row in bad:
            append_row(Path(cfg.run.output_dir) / "bad_rows.jsonl", {"where": row.where, "reason": row.problem})
        print(f"{len(bad)} of {len(rows)} rows of {file} left out, listed in {cfg.run.output_dir}/bad_rows.jsonl")
    return [row for row in rows if not row.problem]


def pool_folder(given: str | None, train_data_dir: str | None) -> str | None:
    """The whole path of a pool that is named relative to train_data_dir, or to the working directory."""
    places = [Path(train_data_dir or "", given), Path(given)] if given else []
    return next((str(place.absolute()) for place in places if place.is_dir()), given)


def retention_files(cfg: RowSettings, split: str) -> list[Path]:
    pools = {"face_retention": cfg.face_retention_pool, "object_retention": cfg.object_retention_pool}
    return [Path(folder) / f"{task}_{split}.jsonl" for task, folder in pools.items() if folder]


def draw_retention(pools: list[list[Row]], n_task_rows: int, ratio: float, seed: int) -> list[Row]:
    """Retention rows for n_task_rows rows of the task, so that they are `ratio` of all: an equal share from each pool,
    none twice, the same ones for the same seed. ValueError when a pool is too small."""
    if not pools:
        return []
    wanted = round(n_task_rows * ratio / (1 - ratio))
    drawn = []
    for number, pool in enumerate(pools):
        share = wanted // len(pools) + (number < wanted % len(pools))
        if share > len(pool):
            raise ValueError(
                f"retention_ratio {ratio} with {n_task_rows} rows of the task needs {share} rows of {pool[0].folder}, "
                f"which has {len(pool)}; make a larger pool, or lower --retention_ratio"
            )
        drawn += [pool[i] for i in np.random.RandomState([seed, number]).permutation(len(pool))[:share]]
    return drawn


@dataclass
class Rows:
    """All rows of a run: to train on (task and retention), to validate on (apart)."""

    train: list[Row]
    task: list[Row]
    retention: list[Row]


def load_all_rows(cfg: RowSettings, processor: Qwen3VLProcessor) -> Rows:
    """ValueError where a file, or rows in it, cannot be used."""
    (Path(cfg.run.output_dir) / "bad_rows.jsonl").unlink(missing_ok=True)
    folder = Path(cfg.data.train_data_dir)
    train_file = folder / (cfg.data.train_data_meta or f"{cfg.task}_train.jsonl")
    task = load_rows(cfg, train_file, processor)
    pools = [load_rows(cfg, file, processor) for file in retention_files(cfg, "train")]
    rows = Rows([*task, *draw_retention(pools, len(task), cfg.retention_ratio, cfg.run.seed)], [], [])
    if cfg.validation.validation_steps:
        most = cfg.max_validation_rows or None
        rows.task = load_rows(cfg, folder / f"{cfg.task}_validation.jsonl", processor)[:most]
        for file in retention_files(cfg, "validation"):
            rows.retention += load_rows(cfg, file, processor)[:most]
    return rows


class Conversations(Dataset):
    """Rows as the model sees them."""

    def __init__(self, rows: list[Row], processor: Qwen3VLProcessor):
        self.rows, self.processor = rows, processor

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: Place) -> dict:
        step_tokens = sum(self.rows[index].answer_tokens for index in place.group)
        return {**encode(self.rows[place.sample], self.processor), **of_place(place), "step_tokens": step_tokens}

    def look_at(self, place: Place) -> dry_run.Sample:
        """For a dry run: the conversation as the model sees it, the answer, which has labels, standing out."""
        row = self.rows[place.sample]
        encoded, tokenizer = encode(row, self.processor), self.processor.tokenizer
        labelled = encoded["labels"] != IGNORE_INDEX  # (L,)
        starts = [0, *(1 + (labelled[1:] != labelled[:-1]).nonzero()[:, 0]).tolist(), len(labelled)]
        said = [
            (dry_run.decoded(tokenizer, encoded["input_ids"][start:end].tolist()), bool(labelled[start]))
            for start, end in itertools.pairwise(starts)
        ]
        images = [decode_image(read_file(inside_folder(row.folder, name))) for name in row.images]
        grids = encoded.get("image_grid_thw", torch.empty(0, 3)).tolist()
        patch = self.processor.image_processor.patch_size
        pictures = {
            f"{name}, {dry_run.size_of(image)} -> {width * patch} x {height * patch}": image
            for name, image, (_, height, width) in zip(row.images, images, grids, strict=True)
        }
        return dry_run.Sample(f"{row.where}: {row.length} tokens, {row.answer_tokens} with labels", pictures, said)


def encode(row: Row, processor: Qwen3VLProcessor) -> dict[str, Tensor]:
    """input_ids, labels, mm_token_type_ids (L,); pixel_values (patches, 1536) and image_grid_thw (images, 3) where
    there are images. Labels are IGNORE_INDEX but for the answer."""
    text = processor.apply_chat_template(row.messages, tokenize=False)
    images = [decode_image(read_file(inside_folder(row.folder, name))) for name in row.images]
    encoded = processor(text=[text], images=images or None, return_tensors="pt")
    input_ids = encoded["input_ids"][0]  # (L,)
    start, end = answer_span(input_ids.tolist(), processor.tokenizer)
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    labels[start:end] = input_ids[start:end]
    assert len(input_ids) == row.length and end - start == row.answer_tokens, "the check counted other tokens"
    tensors = {"input_ids": input_ids, "labels": labels, "mm_token_type_ids": encoded["mm_token_type_ids"][0]}
    return tensors | {name: encoded[name] for name in ("pixel_values", "image_grid_thw") if images}


def collate(samples: list[dict]) -> dict:
    """One micro-batch, padded on the right: input_ids, labels, mm_token_type_ids, attention_mask (B, L); the images of
    all rows one after the other.

    In training also group_size, the rows of the whole step, and step_tokens, their answer tokens; rows that do not say
    those, a benchmark's, are all alike.
    """
    padding = {"input_ids": 0, "labels": IGNORE_INDEX, "mm_token_type_ids": 0}  # masked ids: any will do
    batch = {
        name: pad_sequence([sample[name] for sample in samples], batch_first=True, padding_value=value)
        for name, value in padding.items()
    }
    ones = [torch.ones_like(sample["input_ids"]) for sample in samples]
    batch["attention_mask"] = pad_sequence(ones, batch_first=True)
    for name in ("pixel_values", "image_grid_thw"):
        if found := [sample[name] for sample in samples if name in sample]:
            batch[name] = torch.cat(found)
    first = samples[0]
    if "group_size" in first:
        all_alike = first["group_size"] * int((first["labels"] != IGNORE_INDEX).sum())
        batch |= {"group_size": first["group_size"], "step_tokens": first.get("step_tokens", all_alike)}
    return batch
