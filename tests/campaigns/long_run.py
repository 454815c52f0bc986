"""A long run of the smallest model with validation and saves: do memory, file handles and speed stay flat?

    python tests/campaigns/long_run.py --steps 20000

Prints a line of JSON: medians over the second fifth of the run and over the last one.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import many
from helpers import cpu_environment, read_rows


def campaign(steps: int) -> dict:
    folder = Path(tempfile.mkdtemp(prefix="long_run_"))
    out, every = folder / "run", max(1, steps // 40)
    flags = [*many.flags(folder, steps, every), "--output_dir", out, "--train_batch_size", 1]
    flags += ["--validation_steps", every, "--num_validation_samples", 1, "--num_inference_steps", 2]
    command = [sys.executable, many.RECIPE / "train.py", *flags]
    samples = []  # (seconds, bytes, file handles)
    with (folder / "log").open("w") as log:
        words = [str(word) for word in command]
        process = psutil.Popen(words, env=cpu_environment(), stdout=log, stderr=subprocess.STDOUT)
        while process.poll() is None:
            try:
                samples.append((time.time(), process.memory_info().rss, process.num_fds()))
            except psutil.Error:
                break
            time.sleep(min(5, steps / 1000))
    assert process.wait() == 0, (folder / "log").read_text()[-3000:]
    rows = read_rows(out)
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    first = samples[0][0] + (samples[-1][0] - samples[0][0]) * 0.2

    def part(values: list, number: int) -> float:
        fifth = len(values) // 5
        return statistics.median(values[number * fifth : (number + 1) * fifth])

    trained = [sample for sample in samples if sample[0] > first]
    memory, handles = ([sample[place] for sample in trained] for place in (1, 2))
    speed = [row["seconds_per_step"] for row in rows]
    return {
        "campaign": "long_run",
        "steps": steps,
        "validations": len(list(out.glob("validation_images/step_*"))),
        "minutes": round((samples[-1][0] - samples[0][0]) / 60, 1),
        "memory_mb": [round(part(memory, number) / 1e6) for number in (1, 4)],
        "most_memory_mb": round(max(memory) / 1e6),
        "file_handles": [part(handles, number) for number in (1, 4)],
        "seconds_per_step": [round(part(speed, number), 4) for number in (1, 4)],
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20000)
    print(json.dumps(campaign(parser.parse_args().steps)))
