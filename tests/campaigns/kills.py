"""kill -9 at random moments, and on with --resume_from_checkpoint latest, until the run is done: equal to the straight
one to the last bit?

    python tests/campaigns/kills.py --launch fsdp2 --kills 30 [--minutes 5] [--seed 0]

Of several processes one is killed at a time. Prints a line of JSON; ended_after: the most seconds from a kill to the
end of all processes, launcher included.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import many
from helpers import column

STEPS, SAVES = 40, 3


def campaign(launch: str, kills: int, minutes: float, seed: int) -> dict:
    folder, rng = Path(tempfile.mkdtemp(prefix="kills_")), random.Random(seed)
    processes = 1 if launch == "single" else 2
    argv, told = many.flags(folder, STEPS, SAVES), folder / "told"
    straight, seconds = many.launch_faulty(launch, processes, [*argv, "--output_dir", folder / "straight"])
    straight.check()
    _, seconds = many.launch_faulty(launch, processes, [*argv, "--output_dir", folder / "timed"])  # all is encoded now
    counts = {"campaign": "kills", "launch": launch, "seed": seed, "kills": 0, "runs": 0, "equal": 0, "named": 0}
    counts |= {"ended_after": 0.0, "failed": []}
    end = time.monotonic() + 60 * minutes
    while counts["kills"] < kills and time.monotonic() < end:
        counts["runs"] += 1
        out = folder / f"run{counts['runs']}"
        flags = [*argv, "--output_dir", out, "--resume_from_checkpoint", "latest"]
        while True:
            told.write_text("")
            at = rng.uniform(0.1, seconds - 2)
            goes_on = counts["kills"] < kills and time.monotonic() < end
            fault = ("kill", rng.randrange(processes), f"{at:.3f}s") if goes_on else ()
            done, took = many.launch_faulty(launch, processes, flags, fault, RUN_EXIT_CODE_FILE=str(told))
            if done.returncode == 0 and told.read_text().startswith("0"):
                break
            counts["kills"] += 1
            counts["named"] += f"error: process {fault[1]} was killed" in told.read_text() if fault else 0
            counts["ended_after"] = round(max(counts["ended_after"], took - at), 1)
            if not fault or took - at > 60:
                counts["failed"].append(done.output[-2000:])
                return counts
        same = all(column(out, name) == column(folder / "straight", name) for name in ("loss", "grad_norm"))
        counts["equal"] += same
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--launch", default="single")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--minutes", type=float, default=600, help="no more kills after so many")
    parser.add_argument("--seed", type=int, default=0)
    print(json.dumps(campaign(**vars(parser.parse_args()))))
