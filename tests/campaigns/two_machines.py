"""Two network namespaces on a link of their own, a process in each; the link is cut in mid-run, and the run goes on
when it is back: equal to the straight one?

    sudo python tests/campaigns/two_machines.py --launch fsdp2

Prints a line of JSON; ended_after: seconds from the cut to the end of each side, by keepalives as in real runs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import many
from helpers import column, largest_difference, read_rows, start_command, wait_for

STEPS = 80


def campaign(launch: str) -> dict:
    folder = Path(tempfile.mkdtemp(prefix="two_machines_"))
    argv, out = many.flags(folder, STEPS, 5), folder / "run"
    many.launch_faulty(launch, 2, [*argv, "--output_dir", folder / "straight"])[0].check()
    words = [*argv, "--output_dir", out, "--resume_from_checkpoint", "latest"]
    counts = {"campaign": "two_machines", "launch": launch, "ended_after": [], "said": []}
    with many.two_machines(f"camp{os.getpid()}_") as machines:
        commands = [many.on_machine(machines, number, launch, words, ()) for number in range(2)]
        with start_command(commands[0]) as first, start_command(commands[1]) as second:
            wait_for(lambda: len(read_rows(out)) > 20 or first.poll() is not None, 180, "20 steps")
            subprocess.run(["ip", "-n", machines[0], "link", "set", "wire", "down"], check=True)
            began = time.monotonic()
            for process in (first, second):
                lines = process.communicate(timeout=400)[0].splitlines()
                counts["ended_after"].append(round(time.monotonic() - began))
                counts["said"] += [line for line in lines if line.startswith("error: ")]
        subprocess.run(["ip", "-n", machines[0], "link", "set", "wire", "up"], check=True)
        counts["cut_at_step"] = read_rows(out)[-1]["step"]
        with start_command(commands[0]) as first, start_command(commands[1]) as second:
            ended = [process.communicate(timeout=600)[0] for process in (first, second)]
        counts["ended_well"] = first.returncode == second.returncode == 0
        if not counts["ended_well"]:
            counts["output"] = [text[-1500:] for text in ended]
    counts["largest_difference"] = largest_difference(column(out), column(folder / "straight"))
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--launch", default="ddp")
    print(json.dumps(campaign(**vars(parser.parse_args()))))
