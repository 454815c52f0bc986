"""Random damage to random files of a real checkpoint: is each named, and is the checkpoint before it taken?

    python tests/campaigns/damages.py --damages 1000 [--seed 0]

Prints a line of JSON; accepted: damaged checkpoints that were taken for whole, tracebacks: errors of other kinds.
"""

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import many

from common.record.folder import find_checkpoint


def damage(file: Path, rng: random.Random) -> str:
    """Do one of five things to a file, and say which."""
    size = file.stat().st_size
    kind = rng.choice(["truncated", "flipped", "missing", "empty", "zeroed"] if size else ["missing"])
    if kind == "truncated":
        os.truncate(file, rng.randrange(size))
    elif kind == "missing":
        file.unlink()
    elif kind == "empty":
        file.write_bytes(b"")
    else:
        data, at = bytearray(file.read_bytes()), rng.randrange(size)
        if kind == "flipped":
            data[at] ^= 1 << rng.randrange(8)
        else:
            data[at : at + 4096] = bytes(byte ^ 255 for byte in data[at : at + 4096])
        file.write_bytes(data)
    return kind


def campaign(launch: str, damages: int, seed: int) -> dict:
    folder, rng = Path(tempfile.mkdtemp(prefix="damages_")), random.Random(seed)
    out = folder / "run"
    argv = [*many.flags(folder, 4, 2), "--checkpoints_total_limit", 0, "--output_dir", out]
    many.launch_faulty(launch, 1 if launch == "single" else 2, argv)[0].check()
    older, newer, kept = out / "checkpoint-2", out / "checkpoint-4", folder / "kept"
    shutil.copytree(newer, kept)
    files = sorted(path.relative_to(newer) for path in newer.rglob("*") if path.is_file())
    counts = {"campaign": "damages", "launch": launch, "seed": seed, "damages": damages, "named": 0, "older_taken": 0}
    counts |= {"accepted": [], "tracebacks": [], "kinds": {}}
    for _ in range(damages):
        file = rng.choice(files)
        kind = damage(newer / file, rng)
        counts["kinds"][kind] = counts["kinds"].get(kind, 0) + 1
        try:
            find_checkpoint(out, str(newer))
            counts["accepted"].append(f"{file} {kind}")
        except ValueError as error:
            counts["named"] += str(file) in str(error)
        except Exception as error:
            counts["tracebacks"].append(f"{file} {kind}: {error!r}")
        with contextlib.redirect_stdout(io.StringIO()):
            counts["older_taken"] += find_checkpoint(out, "latest") == older
        shutil.copyfile(kept / file, newer / file)
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--launch", default="single")
    parser.add_argument("--damages", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    print(json.dumps(campaign(**vars(parser.parse_args()))))
