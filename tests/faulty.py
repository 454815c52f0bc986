"""A recipe's train.py in a process that goes wrong on purpose: what tests of many processes launch in its place.

    faulty.py KIND RANK AT train.py ...    KIND: kill, raise, full, memory, mistake or cut; AT: a step, or seconds as
                                           2.5s; a mistake is one in the settings, before anything begins

At a step, the other processes are in no collective, and would be there for minutes. cut: none goes wrong, but a
connection counts as lost after seconds.
"""

import os
import runpy
import signal
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def go_wrong(kind: str) -> None:
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "memory":
        import torch

        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
    if kind == "full":
        from common.processes import DiskFull

        raise DiskFull("the disk is full at step 3")
    raise RuntimeError("planted\nand more of it")


def make_a_mistake() -> None:
    from common.start import config

    def check(cfg: object) -> None:
        raise ValueError("planted")

    config.check = check


def go_wrong_at_step(kind: str, rank: str, at: int) -> None:
    from common.processes import Run

    agree, steps = Run.agree_to_stop, 0

    def count(run: Run) -> None:
        nonlocal steps
        steps += 1
        if steps == at and os.environ.get("RANK", "0") != rank:
            time.sleep(200)
        elif steps == at:
            go_wrong(kind)
        agree(run)

    Run.agree_to_stop = count


if __name__ == "__main__":
    _, kind, rank, at, script, *arguments = sys.argv
    if kind == "cut":
        from common.start import lifeline

        lifeline.KEEPALIVE = {"TCP_KEEPIDLE": 2, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": 3}
    elif kind == "mistake":
        if os.environ.get("RANK", "0") == rank:
            make_a_mistake()
    elif not at.endswith("s"):
        go_wrong_at_step(kind, rank, int(at))
    elif os.environ.get("RANK", "0") == rank:
        timer = threading.Timer(float(at[:-1]), go_wrong, [kind])
        timer.daemon = True  # a run that is done before ends
        timer.start()
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).parent)
    runpy.run_path(script, run_name="__main__")
