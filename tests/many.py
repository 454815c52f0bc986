"""Runs of several processes of which one goes wrong: what test_many_processes.py and campaigns/ start."""

import contextlib
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from helpers import ROOT, Launched, accelerate_command, few_rows, run_command, warm_python

RECIPE = ROOT / "recipes/qwenimage_fulltune"
FAULTY = Path(__file__).with_name("faulty.py")


def flags(folder: Path, steps: int, saves: int) -> list[object]:
    """Of the tiny config on a few rows, which are encoded once for a folder."""
    words = ["--config", RECIPE / "configs/tiny.yaml", *few_rows(RECIPE, folder, 24), "--cache_dir", folder / "cache"]
    words += ["--train_batch_size", 4, "--ema_decay", 0, "--max_train_steps", steps, "--checkpointing_steps", saves]
    return [*words, "--validation_steps", 0, "--no_export_model", "--dataloader_num_workers", 1]


def launch_faulty(
    strategy: str, processes: int, argv: Sequence[object], fault: Sequence[object] = (), **environment: str
) -> tuple[Launched, float]:
    """A run through its launch file, with faulty.py's fault (kind, rank, when) if one is given; and its seconds."""
    python = warm_python(RECIPE)
    command = accelerate_command(RECIPE, strategy, processes, argv, python)
    if fault:
        place = command.index(str(RECIPE / "train.py"))
        command[place:place] = [str(word) for word in (FAULTY, *fault)]
    began = time.monotonic()
    done = run_command(
        command, timeout=300, PYTHON_EXEC=str(python), **{"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "3600", **environment}
    )
    return done, time.monotonic() - began


@contextlib.contextmanager
def two_machines(name: str) -> Iterator[list[str]]:
    """Two network namespaces, NAME0 and NAME1, with addresses 10.231.7.1 and .2 on a link of their own. OSError where
    this machine makes none."""
    names = [f"{name}0", f"{name}1"]

    def ip(*words: str) -> None:
        done = subprocess.run(["ip", *words], capture_output=True, text=True)
        if done.returncode:
            raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")

    try:
        for one in names:
            ip("netns", "add", one)
        ip("link", "add", "wire", "netns", names[0], "type", "veth", "peer", "name", "wire", "netns", names[1])
        for number, one in enumerate(names, start=1):
            ip("-n", one, "address", "add", f"10.231.7.{number}/24", "dev", "wire")
            for device in ("lo", "wire"):
                ip("-n", one, "link", "set", device, "up")
        yield names
    finally:
        for one in names:
            subprocess.run(["ip", "netns", "del", one], capture_output=True)


def on_machine(names: list[str], number: int, strategy: str, argv: Sequence[object], fault: Sequence[object]) -> list:
    """The command that starts machine `number`'s one process of two."""
    words = accelerate_command(RECIPE, strategy, 2, argv)
    for flag, value in (("--num_machines", 2), ("--machine_rank", number), ("--main_process_port", 29517)):
        words[words.index(flag) + 1] = str(value)
    place = words.index(str(RECIPE / "train.py"))
    words[place:place] = ["--main_process_ip", "10.231.7.1", *map(str, (FAULTY, *fault) if fault else ())]
    return ["ip", "netns", "exec", names[number], "env", "GLOO_SOCKET_IFNAME=wire", *words]
