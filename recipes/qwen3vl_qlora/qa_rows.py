"""The rows of all JSONL files here: made by the generators, read by training and evaluation.

A row is one question with its answer:

    {"id": "forward-train-00012", "task": "forward", "entity": "e03", "connector": 4, "images": ["images/e03_1.png"],
     "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "is"}]},
                  {"role": "assistant", "content": [{"type": "text", "text": "the composer of ..."}]}],
     "answer": "the composer of ...", ...}

`images` are relative to the file's folder, one for each {"type": "image"} in reading order. Retention rows have no
entity and no connector. Fields of single tasks: reverse has `correct` and `image_entity` (whose picture it is);
the choices have `options` (four descriptions or four pictures), `option_entities` and `answer_index`. Rows about an
entity have its `description`.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

SPLITS = ("train", "validation", "test")
LETTERS = ("A", "B", "C", "D")


def make_row(
    task: str,
    content: Sequence[str | PurePosixPath],
    answer: str,
    entity: str | None = None,
    connector: int | None = None,
    **fields,
) -> dict:
    """A row without its id. content: the user's turn in reading order, a path for a picture and a string for text."""
    parts = [{"type": "text", "text": c} if isinstance(c, str) else {"type": "image"} for c in content]
    messages = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]
    images = [str(c) for c in content if not isinstance(c, str)]
    start = {"id": "", "task": task, "entity": entity, "connector": connector, "images": images}
    return {**start, "messages": messages, "answer": answer, **fields}


def write_rows(folder: Path, task: str, split: str, rows: Iterable[dict]) -> None:
    """folder/<task>_<split>.jsonl, with ids that count from 0."""
    lines = [json.dumps({**row, "id": f"{task}-{split}-{i:05d}"}, ensure_ascii=False) for i, row in enumerate(rows)]
    (folder / f"{task}_{split}.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def read_rows(folder: Path, task: str, split: str) -> list[dict]:
    """The rows of folder/<task>_<split>.jsonl; ValueError when it is missing, empty or a row is not one of these."""
    path = Path(folder) / f"{task}_{split}.jsonl"
    if not path.is_file():
        there = ", ".join(sorted(file.name for file in Path(folder).glob("*.jsonl"))) or "none"
        raise ValueError(f"no file {path}; JSONL files in that folder: {there}; the generators write them")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):  # not at every Unicode line break
        if not line:
            continue
        try:
            row = json.loads(line)
            parts = row["messages"][0]["content"]
            pictures = sum(part["type"] == "image" for part in parts)
            missing = [name for name in row["images"] if not (path.parent / name).is_file()]
            row["id"], row["task"], row["answer"]  # a KeyError names what is missing
        except (ValueError, KeyError, TypeError, IndexError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"{path}, row {number}: not a row of this recipe ({reason})") from error
        if missing or pictures != len(row["images"]):
            what = f"no picture {missing[0]}" if missing else f"{pictures} image parts, {len(row['images'])} images"
            raise ValueError(f"{path}, row {number}: {what}")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} is empty")
    return rows


def new_folder(path: Path) -> Path:
    """Make the folder. ValueError when it holds something: rows of two runs must not mix."""
    if path.is_dir() and any(path.iterdir()):
        raise ValueError(f"output_dir {path} is not empty; take another, or delete it first")
    path.mkdir(parents=True, exist_ok=True)
    return path


def share_out(items: Sequence, shares: Sequence[float]) -> dict[str, list]:
    """{split: its items} in the order given; the shares of train, validation and test are relative, at least one item
    each.

    ValueError when there are too few items.
    """
    ends = [round(sum(shares[: i + 1]) / sum(shares) * len(items)) for i in range(len(SPLITS))]
    parts = {split: list(items[start:end]) for split, start, end in zip(SPLITS, [0, *ends], ends)}
    if min(shares) <= 0 or not all(parts.values()):
        sizes = ", ".join(f"{split} {len(part)}" for split, part in parts.items())
        raise ValueError(f"--split {' '.join(map(str, shares))} of {len(items)} gives {sizes}; each needs one or more")
    return parts
