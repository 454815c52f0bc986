"""docs/slurm.sbatch and docs/nodes.sh, with stand-ins for srun, scontrol and ssh that run what they are given here."""

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
from helpers import ROOT, wait_for

SLURM, NODES = ROOT / "docs/slurm.sbatch", ROOT / "docs/nodes.sh"
RUN_SH = """#!/usr/bin/env bash
out=$(dirname "$0")/started-$NODE_RANK
trap 'exit 75' USR1
place="$MASTER_ADDR:$MASTER_PORT"
echo "$NODE_RANK of $NNODES at $place launch ${LAUNCH-none}: $*" > "$out.partial" && mv "$out.partial" "$out"
[[ $1 != broken ]] || exit 2
for i in {1..600}; do [[ $1 != endless ]] || sleep 0.05; done
"""
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
for node in 0 1; do SLURM_NODEID=$node "$@" & tasks+=($!); done
trap 'kill -USR1 "${tasks[@]}"' USR1
for task in "${tasks[@]}"; do
    while kill -0 "$task" 2>/dev/null; do wait "$task" && code=0 || code=$?; done
    [[ $code -le ${worst:-0} ]] || worst=$code
done
exit "${worst:-0}"
"""
SCONTROL = """#!/usr/bin/env bash
if [[ $1 == show ]]; then printf '%s\\n' node7 node8; else echo "$*" >> "$SAID"; fi
"""
SSH = """#!/usr/bin/env bash
[[ $1 == -n ]] && shift
echo "$1" >> "$SAID"
shift
exec env --default-signal=INT,HUP,TERM,USR1 bash -c "$*"
"""
# of `man sbatch`: those that these files use, and what they may be given
OPTIONS = {
    "job-name": r"\w+",
    "nodes": r"\d+",
    "ntasks-per-node": r"1",
    "gpus-per-node": r"\d+",
    "cpus-per-task": r"\d+",
    "mem": r"0",
    "time": r"\d+:\d\d:\d\d",
    "signal": r"B:USR1@\d+",
    "requeue": "",
    "open-mode": r"append",
    "output": r"%x-%j\.log",
}


@pytest.fixture
def cluster(tmp_path) -> dict[str, str]:
    """The environment of a job on two nodes; tmp_path/recipe is what runs, tmp_path/said what was asked for."""
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "ssh": SSH}.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe/run.sh").write_text(RUN_SH)
    slurm = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "123456"}
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    return {**os.environ, **slurm, "PATH": path, "SAID": str(tmp_path / "said"), "LAUNCH": "fsdp2"}


def run(words: list[object], environment: dict[str, str], stop_when: Path | None = None, by: int = 0) -> int:
    """The exit code of a command; stop_when: the file after which it gets the signal `by`."""
    process = subprocess.Popen([str(word) for word in words], env=environment)
    try:
        if stop_when:
            both = [stop_when, stop_when.with_name("started-0")]
            wait_for(lambda: all(file.exists() for file in both), 20, "both nodes started")
            process.send_signal(by)
        return process.wait(30)
    finally:
        process.kill()


@pytest.mark.parametrize("file", [SLURM, NODES], ids=lambda file: file.name)
def test_they_parse(file):
    subprocess.run(["bash", "-n", file], check=True)


def test_directives_are_sbatchs():
    """Catches a directive that SLURM does not know, or does not see because a command stands before it."""
    lines = SLURM.read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    given = [line for line in lines if line.startswith("#SBATCH")]
    assert given == [line for line in lines[:first] if line.startswith("#SBATCH")] and len(given) == len(OPTIONS)
    for line in given:
        name, _, value = re.fullmatch(r"#SBATCH --([\w-]+)(=?)(\S*)", line).groups()
        assert re.fullmatch(OPTIONS[name], value), line


def test_slurm_starts_each_node_and_a_stopped_job_queues_again(cluster, tmp_path):
    """Catches nodes that do not find each other, USR1 that does not reach the run, a stop that is not gone on from."""
    code = run(
        ["bash", SLURM, tmp_path / "recipe", "endless", "--seed", 1],
        cluster,
        tmp_path / "recipe/started-1",
        signal.SIGUSR1,
    )
    assert code == 75 and (tmp_path / "said").read_text() == "requeue 123456\n"
    for rank in range(2):
        said = (tmp_path / f"recipe/started-{rank}").read_text()
        where = f"{rank} of 2 at node7:23456 launch fsdp2"
        assert said == f"{where}: endless --seed 1 --resume_from_checkpoint latest\n"


@pytest.mark.parametrize(("config", "code"), [("short", 0), ("broken", 2)])
def test_slurm_does_not_queue_again_what_is_done_or_wrong(cluster, tmp_path, config, code):
    """Catches a job that starts for ever, with a mistake in its settings."""
    assert run(["bash", SLURM, tmp_path / "recipe", config], cluster) == code
    assert not (tmp_path / "said").exists()


@pytest.mark.parametrize("by", [signal.SIGUSR1, signal.SIGTERM], ids=lambda number: number.name)
def test_nodes_are_asked_to_stop(cluster, tmp_path, by):
    """Catches remote runs that go on as orphans, and an exit code that hides that they can be resumed."""
    words = ["bash", NODES, "one two", tmp_path / "recipe", "endless", "--prompt", "a 'red' $HOME"]
    assert run(words, cluster, tmp_path / "recipe/started-1", by) == 75
    for rank in range(2):
        said = (tmp_path / f"recipe/started-{rank}").read_text()
        assert said == f"{rank} of 2 at one:29500 launch fsdp2: endless --prompt a 'red' $HOME\n"
    assert set((tmp_path / "said").read_text().split()) == {"one", "two"}


def test_nodes_tell_a_mistake(cluster, tmp_path):
    """Catches a failure that ends as success."""
    assert run(["bash", NODES, "one two", tmp_path / "recipe", "broken"], cluster) == 2
    assert run(["bash", NODES, "one two", tmp_path / "nowhere"], cluster) == 2
