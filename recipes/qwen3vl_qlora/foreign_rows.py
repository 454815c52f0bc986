"""Rows of ms-swift, LLaVA and ShareGPT as rows of qa_rows.py: `<image>` inside strings becomes a part of its own.

    ms-swift  {"messages": [{"role": "user", "content": "<image>is"}, ...], "images": ["1.png"]}
    LLaVA     {"image": "1.png", "conversations": [{"from": "human", "value": "<image>\\nis"}, {"from": "gpt", ...}]}
    ShareGPT  {"images": ["1.png"], "system": "...", "conversations": [{"from": "human", "value": "..."}, ...]}

Whatever else a row has stays as it is, for the check of every row to judge.
"""

import re

SIGN = "<image>"
OTHER_MEDIA = ("video", "videos", "audio", "audios")
ROLES = {"human": "user", "gpt": "assistant"}


def as_own(row: object) -> object:
    """The row in this recipe's form; as it is where that is so already, or unknown; a ValueError for other media."""
    if not isinstance(row, dict):
        return row
    if media := [name for name in OTHER_MEDIA if row.get(name)]:
        return ValueError(f"it has {media[0]}, and pictures alone are trained")
    conversations = row.get("conversations")
    if isinstance(row.get("messages"), list) and isinstance(row.get("images"), list):
        turns = row["messages"]
    elif "messages" not in row and isinstance(conversations, list):
        system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
        turns = [*system, *map(_turn, conversations)]
    else:
        return row
    images = row.get("images", row.get("image"))
    images = images if isinstance(images, list) else [] if images is None else [images]
    rest = {name: value for name, value in row.items() if name not in ("conversations", "image", "system")}
    return {**rest, "images": images, "messages": [_with_parts(turn) for turn in turns]}


def _turn(turn: object) -> object:
    """{"from", "value"} as {"role", "content"}."""
    if not isinstance(turn, dict) or turn.keys() != {"from", "value"}:
        return turn
    speaker = turn["from"]
    return {"role": ROLES.get(speaker, speaker) if isinstance(speaker, str) else speaker, "content": turn["value"]}


def _with_parts(turn: object) -> object:
    """The turn with a part for each sign; blanks beside a sign go, as in Qwen's own script."""
    content = turn.get("content") if isinstance(turn, dict) else None
    if not isinstance(content, str) or SIGN not in content:
        return turn
    pieces = re.split(f"({SIGN})", content)
    parts = [{"type": "image"} if piece == SIGN else {"type": "text", "text": piece.strip()} for piece in pieces]
    return {**turn, "content": [part for part in parts if part.get("text") != ""]}
