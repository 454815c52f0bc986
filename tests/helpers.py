"""What the tests of every recipe share: loading a recipe's scripts, running it in this process or through `accelerate
launch`."""

import ast
import atexit
import contextlib
import fcntl
import functools
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch
import yaml
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def promised_recipes() -> list[Path]:
    """The folders that README.md's table links. What stands beside them, a person's own copy for one, is held to
    nothing."""
    rows = re.findall(r"^\| \[(\w+)\]\(recipes/(\w+)/README\.md\)", (ROOT / "README.md").read_text(), re.MULTILINE)
    return sorted(ROOT / "recipes" / folder for _, folder in rows)


RECIPES = promised_recipes()
ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",  # launched runs are CPU runs on every machine, so that two processes can always start
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "WANDB_MODE": "offline",
}


def recipe_fixtures(conftest: str) -> tuple:
    """The fixtures recipe, train, make_tiny and settings of a recipe's tests, for its conftest.py to name: its folder,
    its scripts, and settings(seed=5), its Config as the flag --seed 5 makes it, checked."""
    folder = ROOT / "recipes" / Path(conftest).parent.name

    @pytest.fixture(scope="session")
    def recipe() -> Path:
        return folder

    @pytest.fixture(scope="session")
    def train() -> ModuleType:
        return load_script(folder / "train.py")

    @pytest.fixture(scope="session")
    def make_tiny() -> ModuleType:
        return load_script(folder / "make_tiny.py")

    @pytest.fixture(scope="session")
    def settings(train: ModuleType) -> Callable:
        from common.start.config import parse_recipe

        def make(**values: object) -> object:
            flags: list[str] = []
            for name, value in {"train_data_dir": "unused", **values}.items():
                if isinstance(value, bool):
                    flags.append(f"--{name}" if value else f"--no-{name}")
                else:
                    flags += [f"--{name}", *map(str, value if isinstance(value, tuple) else [value])]
            return parse_recipe(train.Config, flags)

        return make

    return recipe, train, make_tiny, settings


@contextlib.contextmanager
def copy_of_recipe(recipe: Path, name: str) -> Iterator[Path]:
    """A copy in recipes/, as a person makes it, as long as the block lasts; what it writes to outputs/ goes too."""
    copy = recipe.with_name(f"copied_by_a_test_{name}")
    written = copy, ROOT / "outputs" / copy.name
    for folder in written:
        shutil.rmtree(folder, ignore_errors=True)
    try:
        yield Path(shutil.copytree(recipe, copy, ignore=shutil.ignore_patterns("__pycache__")))
    finally:
        for folder in written:
            shutil.rmtree(folder, ignore_errors=True)


def load_script(path: Path) -> ModuleType:
    """A recipe's script as a module, loaded once under a name of its own (every recipe has a train.py)."""
    name = f"{path.parent.name}_{path.stem}_{abs(hash(path))}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def run_main(train: ModuleType, argv: Sequence[object], at_step: dict[int, Callable[[], None]] | None = None) -> None:
    """train.main(argv) in this process, on the CPU, as one process. at_step: what to call at the end of a step."""
    from accelerate.state import AcceleratorState, GradientState

    from common.processes import Run, stop
    from common.step import steps

    agree, learning_rate, step = Run.agree_to_stop, steps.learning_rate, 0

    def note_step(now: int, *arguments: object) -> float:
        nonlocal step
        step = now + 1
        return learning_rate(now, *arguments)

    def call_and_agree(run: Run) -> None:
        (at_step or {}).get(step, lambda: None)()
        agree(run)

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    stop.asked, stop.agreed, stop.reason = False, False, ""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE_", "FSDP_"))}
    try:
        with (
            mock.patch.object(Run, "agree_to_stop", call_and_agree),
            mock.patch.object(steps, "learning_rate", note_step),
            mock.patch.object(torch.cuda, "is_available", lambda: False),
            mock.patch.dict(os.environ, {**environment, **ENVIRONMENT}, clear=True),
        ):
            train.main([str(word) for word in argv])
    finally:
        stop.asked, stop.agreed, stop.reason = False, False, ""
        for number, handler in handlers.items():
            signal.signal(number, handler)
        AcceleratorState._reset_state(True)
        GradientState._reset_state()


@dataclass
class Launched:
    """How a launched run ended."""

    returncode: int
    output: str

    def check(self) -> "Launched":
        assert self.returncode == 0, f"exit code {self.returncode}:\n{self.output[-6000:]}"
        return self


def accelerate_command(
    recipe: Path, launch: str | Path, processes: int, argv: Sequence[object], python: str | Path = sys.executable
) -> list[str]:
    """The command that run.sh ends in; launch: a name in accelerate/, or a file."""
    file = launch if isinstance(launch, Path) else recipe / f"accelerate/{launch}.yaml"
    words = [python, "-m", "accelerate.commands.launch", "--config_file", file]
    words += ["--num_machines", 1, "--machine_rank", 0, "--main_process_port", 0, "--num_processes", processes]
    return [str(word) for word in (*words, recipe / "train.py", *argv)]


def few_rows(recipe: Path, folder: Path, count: int = 48) -> list[object]:
    """Flags for a run of the tiny config on the first rows of its data: to encode all of them takes longer than a few
    steps. None for a recipe that encodes nothing."""
    make_tiny_base(recipe)
    for file in (ROOT / "outputs" / recipe.name / "tiny_base/data").glob("train.json*"):
        if file.suffix == ".jsonl":
            text = "".join(file.read_text().splitlines(keepends=True)[:count])
        else:
            text = json.dumps(json.loads(file.read_text())[:count])
        (folder / file.name).write_text(text)
        return ["--train_data_meta", folder / file.name]
    return []


@contextlib.contextmanager
def locked(name: str, alone: bool = True) -> Iterator[None]:
    """One of the test processes at a time. alone=False: with others that do not ask to be alone."""
    with (Path(tempfile.gettempdir()) / f"finetuning_recipes_{os.getuid()}_{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield


def make_tiny_base(recipe: Path) -> None:
    """The base in outputs/ that run.sh makes when there is none: here, so that two that start at once do not."""
    if recipe in RECIPES:
        with locked(f"tiny_base_{recipe.name}"):
            load_script(recipe / "make_tiny.py").make(ROOT / "outputs" / recipe.name / "tiny_base")


def run_command(command: Sequence[object], timeout: float = 600, **environment: str) -> Launched:
    """Run a command on the CPU, stdout and stderr together; its whole process group is ended when it takes too
    long."""
    with start_command(command, **environment) as process:
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            raise AssertionError(f"not done after {timeout} s:\n{output[-6000:]}") from None
    return Launched(process.returncode, output)


def cpu_environment() -> dict[str, str]:
    """The variables of runs that tests start."""
    variables = {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE_", "FSDP_"))}
    return {**variables, **ENVIRONMENT, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def start_command(command: Sequence[object], **environment: str) -> subprocess.Popen:
    for script in (Path(str(word)) for word in command[:2]):
        if script.name == "run.sh":
            make_tiny_base(script.parent)
    return subprocess.Popen(
        [str(word) for word in command],
        env={**cpu_environment(), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        cwd="/",
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # `pytest &` ignores it
    )


def launch(recipe: Path, strategy: str | Path, processes: int, argv: Sequence[object], **environment: str) -> Launched:
    """Run a recipe through its launch file, in processes that find their imports done, and wait for it. NVMe offload
    has the machine to itself: where a process waits for its files while others run, gloo takes it for lost."""
    python = warm_python(recipe)
    command = accelerate_command(recipe, strategy, processes, argv, python)
    with locked("launched_runs", alone="nvme" in str(strategy)):
        return run_command(command, **{"PYTHON_EXEC": str(python), **environment})


@functools.lru_cache(maxsize=1)
def warm_python(recipe: Path) -> Path:
    """A command like python, for processes that find what a recipe's train.py imports from elsewhere imported: see
    warm.py. One server at a time, of the recipe that was asked for last."""
    folder = Path(tempfile.mkdtemp(prefix="warm_python_"))
    warm, python = Path(__file__).with_name("warm.py"), folder / "python"
    words = [sys.executable, warm, "serve", folder / "socket", recipe / "train.py"]
    server = subprocess.Popen([str(word) for word in words], env=cpu_environment(), stdin=subprocess.PIPE, cwd="/")

    def stop() -> None:
        server.stdin.close()
        server.wait()
        shutil.rmtree(folder, ignore_errors=True)

    atexit.register(stop)
    python.write_text(
        f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -S {shlex.quote(str(warm))} ask {folder}/socket "$@"\n'
    )
    python.chmod(0o755)
    wait_for(lambda: (folder / "socket").exists() or server.poll() is not None, 120, f"the imports of {recipe.name}")
    assert server.poll() is None, f"importing {recipe / 'train.py'} failed"
    return python


class NamedRuns:
    """Runs of a test module by name, each done once, when a test first asks for it. flags: of every run."""

    def __init__(self, train: ModuleType, recipe: Path, config: Path, folder: Path, flags: Sequence[object] = ()):
        self.train, self.recipe, self.config, self.folder, self.flags = train, recipe, config, folder, flags
        self.done: dict[str, Path] = {}
        self.output: dict[str, str] = {}  # of launched runs, failed ones too

    def argv(self, name: str, flags: Sequence[object]) -> list[object]:
        return ["--config", self.config, "--output_dir", self.folder / name, *self.flags, *flags]

    def single(self, name: str, *flags: object) -> Path:
        """The output_dir of a run as one process, in this one."""
        if name not in self.done:
            run_main(self.train, self.argv(name, flags))
            self.done[name] = self.folder / name
        return self.done[name]

    def launched(self, name: str, strategy: str | Path, *flags: object, processes: int = 2) -> Path:
        """The output_dir of a run through a launch file. A run that failed is not tried again."""
        if name not in self.done:
            assert name not in self.output, f"{name} failed before: {self.output[name][-500:]}"
            ended = launch(self.recipe, strategy, processes, self.argv(name, flags))
            self.output[name] = ended.output
            ended.check()
            self.done[name] = self.folder / name
        return self.done[name]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's safetensors files: of an export, a model's part, or a checkpoint's model."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_equal_within_bf16(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Two exports of runs that differ in the last bits of float32: the same but for a step of bf16 here and there."""
    assert ours.keys() == theirs.keys() and theirs
    for name, tensor in theirs.items():
        a, b = ours[name].float(), tensor.float()
        assert ours[name].dtype == tensor.dtype == torch.bfloat16
        assert ((a - b).abs() <= 2**-7 * b.abs() + 2e-5).all(), (name, (a - b).abs().max())
        assert (a != b).float().mean() < 0.02 or a.numel() < 500, (name, (a != b).float().mean())


def assert_equal_weights(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """The same names, and the same values to the last bit."""
    assert ours.keys() == theirs.keys() and theirs
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.02)


def read_rows(path: Path) -> list[dict]:
    """The rows of metrics.jsonl or validation.jsonl; path is the file or the run's folder."""
    path = path / "metrics.jsonl" if path.is_dir() else path
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def read_card(folder: Path, run: Path, step: int) -> str:
    """The model card in a folder that a run wrote at this step: its front matter and Python parse, its losses are the
    run's there, and no folder of this machine is named."""
    text = (folder / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    assert set(yaml.safe_load(head)) <= {"base_model", "library_name"} and f"| steps | {step} of " in body
    ast.parse(between(body, "```python", "```"))
    for title, file, name in (("loss", "metrics", "loss"), ("held-out loss", "validation", "validation_loss")):
        value = next(row[name] for row in read_rows(run / f"{file}.jsonl") if row["step"] == step)
        assert f"| {title} | {value:.4g} |" in body, title
    assert str(run.parent) not in text and tempfile.gettempdir() not in text
    return text


def column(path: Path, name: str = "loss", from_step: int = 1) -> dict[int, float]:
    """{step: value} of a run's metrics.jsonl."""
    return {row["step"]: row[name] for row in read_rows(path) if row["step"] >= from_step}


def largest_difference(a: dict[int, float], b: dict[int, float]) -> float:
    """Largest relative difference of two columns over the steps of both; the steps must be the same."""
    assert a.keys() == b.keys() and a, (sorted(a), sorted(b))
    return max(abs(a[step] - b[step]) / abs(b[step]) for step in a)


def tracked_files() -> list[Path]:
    """Files that git tracks or would track, without the copies that other tests make meanwhile."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    names = [name for name in names if name and "/copied_by_a_test_" not in name]
    return [ROOT / name for name in names if (ROOT / name).is_file()]


def between(text: str, start: str, end: str) -> str:
    """What lies between two marker lines, each of which must be there once."""
    found = re.findall(
        rf"^[ \t]*{re.escape(start)}[ \t]*\n(.*?)^[ \t]*{re.escape(end)}", text, re.MULTILINE | re.DOTALL
    )
    assert len(found) == 1, f"{len(found)} times {start!r} ... {end!r}, expected once"
    return found[0]
