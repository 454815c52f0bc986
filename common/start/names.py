"""Commands of other scripts and launchers: second names of flags, flags with nothing to set here, launchers' own."""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path


def plain(word: str) -> str:
    """A flag's name as it is written here: without dashes, no- and a value."""
    name = word.split("=")[0].lstrip("-").replace("-", "_")
    return name.removeprefix("no_")


def translated(words: Sequence[str], second_names: Mapping[str, str], skipped: Mapping[str, str]) -> list[str]:
    """Flags under the names that the parser knows. What `skipped` names is left out, with its values and a notice. A
    second name may stand for a value ("fp16": "mixed_precision=fp16"); its --no- form then asks for nothing."""
    result: list[str] = []
    skips = False
    for word in words:
        if not word.startswith("--"):
            if not skips:
                result.append(word)
            continue
        name = plain(word)
        skips = name in skipped
        if skips:
            if os.environ.get("RANK", "0") == "0":
                print(f"--{name} is skipped: {skipped[name]}", file=sys.stderr)
        elif name in second_names:
            negated = "no-" if word.replace("_", "-").startswith("--no-") else ""
            _, equals, value = word.partition("=")
            if not (negated and "=" in second_names[name]):
                result.append(f"--{negated}{second_names[name]}{equals}{value}")
        else:
            result.append(word)
    return result


def described(second_names: Mapping[str, str], skipped: Mapping[str, str]) -> str:
    """What --help says of them."""
    names = [f"--{name} is --{own}" for name, own in second_names.items()]
    said = f" Second names: {', '.join(names)}." if names else ""
    return said + (f" Skipped with a notice: {', '.join(f'--{name}' for name in skipped)}." if skipped else "")


def take_launcher_flags(words: Sequence[str]) -> list[str]:
    """Leave out what the deepspeed launcher adds to a script's flags, and hand it to accelerate as its own launcher
    would: --deepspeed, --deepspeed_config FILE (the working directory's, or else the recipe's) and --local_rank N."""
    result: list[str] = []
    words = list(words)
    while words:
        word = words.pop(0)
        name, _, value = word.partition("=")
        if name in ("--deepspeed_config", "--local_rank", "--local-rank"):
            value = value or (words.pop(0) if words else "")
            if name == "--deepspeed_config":
                file = os.path.abspath(value) if Path(value).is_file() else value
                os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": file}
        elif name != "--deepspeed":
            result.append(word)
    return result
