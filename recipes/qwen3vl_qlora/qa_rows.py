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
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path, PurePosixPath

from common.data.json_rows import json_rows, short

SPLITS = ("train", "validation", "test")
LETTERS = ("A", "B", "C", "D")
ROLES = ("system", "user", "assistant")


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
    for row, number, _ in json_rows(path):
        problem = row_problem(row)
        if not problem and not all(isinstance(row.get(name), str) for name in ("id", "task", "answer")):
            problem = "expected texts as id, task and answer"
        missing = [] if problem else [name for name in row["images"] if not (path.parent / name).is_file()]
        if missing:
            problem = f"no picture {missing[0][:200]}"
        if problem:
            raise ValueError(f"{path}, row {number}: {problem}")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} is empty")
    return rows


def row_problem(row: object, special_tokens: Collection[str] = ()) -> str:
    """Why a row's images and messages cannot be used, "" if they can. special_tokens: the tokenizer's, which no text
    may contain, since they would begin and end turns and pictures where there are none."""
    if isinstance(row, ValueError):
        return f"not a row: {row}"
    if not isinstance(row, dict) or not {"images", "messages"} <= row.keys():
        return f"not a row: got {short(row)}, expected an object with images and messages"
    images, messages = row["images"], row["messages"]
    if not isinstance(images, list) or not all(isinstance(name, str) and name for name in images):
        return f"images is {short(images)}, expected a list of paths"
    if not isinstance(messages, list):
        return f"messages is {short(messages)}, expected a list of turns"
    for number, turn in enumerate(messages):
        if problem := turn_problem(turn, special_tokens):
            return f"messages[{number}]{problem}"
    roles = [turn["role"] for turn in messages]
    if not roles or roles[-1] != "assistant" or not "".join(part_texts(messages[-1])).strip():
        return "the last turn must be the assistant's answer, and not empty"
    if "user" not in roles or "system" in roles[1:]:
        return f"the roles are {short(roles)}; expected system at the start if at all, and a user before the answer"
    pictures = sum(part["type"] == "image" for turn in messages for part in turn["content"] if isinstance(part, dict))
    if pictures != len(images):
        return f"{pictures} image parts in messages, {len(images)} images; expected the same number"
    return ""


def turn_problem(turn: object, special_tokens: Collection[str]) -> str:
    """Why one turn cannot be used; "" if it can."""
    if not isinstance(turn, dict) or turn.keys() != {"role", "content"}:
        return f" is {short(turn)}, expected role and content, nothing else"
    role, content = turn["role"], turn["content"]
    if role not in ROLES:
        return f".role is {short(role)}, expected {', '.join(ROLES)}"
    if not isinstance(content, str | list):
        return f".content is {short(content)}, expected a text or a list of parts"
    for number, part in enumerate(content if isinstance(content, list) else []):
        text = isinstance(part, dict) and part.keys() == {"type", "text"} and part["type"] == "text"
        if part != {"type": "image"} and not (text and isinstance(part["text"], str)):
            expected = 'expected {"type": "image"} (its path is in images) or {"type": "text", "text": "..."}'
            return f".content[{number}] is {short(part)}, {expected}"
        if not text and role != "user":
            return f".content[{number}] is an image, expected those in the user's turns alone"
    found = [token for token in special_tokens if any(token in text for text in part_texts(turn))]
    return f": a text contains {min(found)}, which is a sign of the template's" if found else ""


def part_texts(turn: dict) -> list[str]:
    """The text parts of one turn, whose content is a string or a list of parts."""
    content = turn["content"]
    return [content] if isinstance(content, str) else [part["text"] for part in content if part["type"] == "text"]


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
