"""What --plan computes, against every bench that a README has measured, and what it says and refuses."""

import functools
import itertools
import re
from dataclasses import dataclass

import pytest
from helpers import ROOT, load_script

from common.start import launch, needs, plan, ways
from common.start.config import parse_recipe

MEMORY, TIME = 0.08, 0.15  # shares that the plan may be wrong by
UNMET = {  # by more than that, and why
    ("qwenimage_fulltune", "| NF4 (`lora_24gb`) |", "s/sample"): "waits for launches of 4-bit operators: unknown",
    ("qwen3vl_qlora", "| | 8 |", "gib"): "measured before norms handed on half precision: 26.5 GiB, and 23.0 since",
    (
        "kolors_spatial_adapter",
        "| `--no_cuda_graphs --compile` |",
        "s/step",
    ): "waits for launches: unknown",
}


@dataclass(frozen=True)
class Bench:
    """One measured row of a README, and the command that it is from."""

    recipe: str
    row: str
    """how the row begins"""
    flags: str = ""
    launch: str = "single"
    gpus: int = 1
    card: str = "H100"


LORA = "--lora_rank 32 --lora_alpha 32 --optimizer adamw --no_gradient_release --train_batch_size 1"
NF4 = f"{LORA} --base_precision nf4 --max_grad_norm 1 --gradient_checkpointing"
FSDP2 = "--optimizer flash_adamw --no_gradient_release --max_grad_norm 1"
BENCHES = [
    Bench("qwenimage_fulltune", "| 1 x H100 80GB | single, adafactor with gradient release | 4 |"),
    Bench("qwenimage_fulltune", "| 1 x H100 80GB | the same | 1 |", "--train_batch_size 1"),
    Bench(
        "qwenimage_fulltune",
        "| 1 x H100 80GB | the same, `--no_gradient_checkpointing` |",
        "--train_batch_size 1 --no_gradient_checkpointing",
    ),
    Bench("qwenimage_fulltune", "| 2 x H200 | fsdp2, flash_adamw, clipped |", FSDP2, "fsdp2", 2, "H200"),
    Bench("qwenimage_fulltune", "| H100 80GB, capped to 22.5 GiB |", "--stream_blocks -1"),
    Bench("qwenimage_fulltune", "| the same | the same | 8 |", "--stream_blocks -1 --train_batch_size 8"),
    Bench("qwenimage_fulltune", "| NF4 (`lora_24gb`) |", NF4),
    Bench("flux2klein_fulltune", "| NF4 (`lora_24gb`) |", NF4),
    Bench("qwenimage_edit", "| NF4 (`lora_24gb`), one source |", NF4),
    Bench("qwenimage_edit", "| bf16 (`lora`), one source |", LORA),
    Bench("flux2klein_fulltune", "| adafactor (config `bench`) |"),
    Bench("flux2klein_fulltune", "| flash_adamw | 1 | no |", "--optimizer flash_adamw --train_batch_size 1"),
    Bench(
        "flux2klein_fulltune",
        "| flash_adamw (config `full_1gpu`) |",
        "--optimizer flash_adamw --train_batch_size 4 --gradient_checkpointing",
    ),
    Bench("qwenimage_edit", "| all (config `bench`) |"),
    Bench(
        "qwenimage_edit",
        "| all | 2 | 448 |",
        "--benchmark_sources 2 --benchmark_prompt_tokens 448 --train_batch_size 1",
    ),
    Bench("qwenimage_edit", "| LoRA of rank 32, `adamw` |", LORA),
    Bench("kolors_spatial_adapter", "| (CUDA graphs, as in the configs) |"),
    Bench("kolors_spatial_adapter", "| `--gradient_checkpointing` (configs", "--gradient_checkpointing"),
    Bench("kolors_spatial_adapter", "| `--no_cuda_graphs` |", "--no_cuda_graphs"),
    Bench(
        "kolors_spatial_adapter",
        "| `--no_cuda_graphs --gradient_checkpointing` |",
        "--no_cuda_graphs --gradient_checkpointing",
    ),
    Bench("kolors_spatial_adapter", "| `--no_cuda_graphs --compile` |", "--no_cuda_graphs --compile"),
    Bench("kolors_spatial_adapter", "| `--compile` |", "--compile"),
    Bench("kolors_spatial_adapter", "| `--train_batch_size 4` |", "--train_batch_size 4"),
    Bench("kolors_spatial_adapter", "| generation |", "--modes generation"),
    Bench("kolors_spatial_adapter", "| captioning,generation |", "--modes captioning,generation"),
    Bench("kolors_spatial_adapter", "| captioning,retrieval,generation |"),
    Bench("kolors_spatial_adapter", "| single | 1 x H100 |"),
    Bench("kolors_spatial_adapter", "| ddp | 2 x H200 |", "", "ddp", 2, "H200"),
    Bench(
        "kolors_spatial_adapter",
        "| ddp, `--gradient_checkpointing --gradient_accumulation_steps 3` |",
        "--gradient_checkpointing --gradient_accumulation_steps 3",
        "ddp",
        2,
        "H200",
    ),
    Bench("kolors_spatial_adapter", "| zero2 (AdamW in RAM) |", "", "zero2", 2, "H200"),
    Bench("kolors_spatial_adapter", "| zero2, `--no_cuda_graphs` |", "--no_cuda_graphs", "zero2", 2, "H200"),
    Bench("qwen3vl_qlora", "| 1 x H100 80GB | 1 |"),
    Bench("qwen3vl_qlora", "| | 4 |", "--train_batch_size 4"),
    Bench("qwen3vl_qlora", "| | 8 |", "--train_batch_size 8"),
    Bench("qwen3vl_qlora", "| 2 x H200, ddp |", "--train_batch_size 4", "ddp", 2, "H200"),
]


def measured(bench: Bench) -> dict[str, tuple[float, float]]:
    """{column: (lowest, highest)} of a row's measured cells: "gib" and "s/step"."""
    lines = (ROOT / "recipes" / bench.recipe / "README.md").read_text().splitlines()
    for at in (index for index, line in enumerate(lines) if line.startswith(bench.row)):
        head = max(index for index in range(at) if lines[index].startswith("|---")) - 1
        if "GiB" in lines[head] or "s/step" in lines[head]:
            break
    names, cells = ([cell.strip() for cell in lines[index].strip("|").split("|")] for index in (head, at))
    found = {}
    for name, cell in zip(names, cells, strict=True):
        numbers = [float(each) for each in re.findall(r"\d+\.?\d*", cell.split(" (")[0].split(",")[0])]
        if numbers and "GiB" in name:
            found["gib"] = (numbers[0], numbers[0])
        elif numbers and name.startswith("s/step"):
            found["s/step"] = (min(numbers), max(numbers))
        elif numbers and name.startswith("s/sample") and "s/step" not in names[: names.index(name)]:
            found["s/sample"] = (min(numbers), max(numbers))
    return found


sizes = {}  # traced, by what they depend on


def traced_once(run, cfg, model, sample, trial, checkpointing):
    shapes = tuple((name, tuple(tensor.shape)) for name, tensor in sample.items())
    modes, lora = getattr(cfg, "modes", ""), str(getattr(cfg, "lora", ""))
    compiled = cfg.speed.compile and not modes  # the UNet's parts are traced one operation after the other
    key = (shapes, modes, lora, checkpointing, compiled, cfg.batch.train_batch_size)
    if key not in sizes:
        sizes[key] = traced_size(run, cfg, model, sample, trial, checkpointing)
    return sizes[key]


traced_size = plan.traced_size


def computed(bench: Bench, monkeypatch) -> dict[str, float]:
    """The same by the plan."""
    recipe = ROOT / "recipes" / bench.recipe
    train = load_script(recipe / "train.py")
    flags = ["--config", str(recipe / "configs/bench.yaml"), "--plan", "--gpus", f"{bench.gpus}x80"]
    monkeypatch.setenv("LAUNCH", bench.launch)
    monkeypatch.setattr(plan, "traced_size", traced_once)
    found = {}

    def show(run, cfg, layout, machine, size_with, sample):
        machine.card = bench.card
        size = size_with(cfg.speed.gradient_checkpointing or bool(cfg.tuning.stream_blocks))
        found["gib"] = sum(needs.gpu_gib(cfg, size, layout, bench.gpus).values())
        seconds = needs.seconds_a_step(cfg, size, layout, machine)
        samples = cfg.batch.train_batch_size * cfg.batch.gradient_accumulation_steps
        if seconds is not None:
            found.update({"s/step": seconds, "s/sample": seconds / samples})

    monkeypatch.setattr(ways, "show", show)
    with pytest.raises(SystemExit) as ended:
        train.main([*flags, *bench.flags.split()])
    assert ended.value.code == 0
    return found


@pytest.mark.slow
@pytest.mark.parametrize("bench", BENCHES, ids=lambda bench: f"{bench.recipe}{bench.row}".replace(" ", ""))
def test_plans_are_what_was_measured(bench, monkeypatch):
    """Catches a plan that promises a machine what it cannot hold, or other hours than a run will take: memory within
    8%, time within 15% of each bench of the READMEs. Of offloaded optimizers no time is computed."""
    by_count, by_hand = computed(bench, monkeypatch), measured(bench)
    assert by_hand and "gib" in by_count
    for name, (low, high) in by_hand.items():
        if name in by_count:
            share = MEMORY if name == "gib" else TIME
            right = (1 - share) * low <= by_count[name] <= (1 + share) * high
            unmet = (bench.recipe, bench.row, name) in UNMET
            assert right != unmet, f"{name}: {by_count[name]:.3f} by count, {low} to {high} measured"


def test_every_measured_row_is_compared():
    """Catches a bench that was added to a README, and that no plan is compared with."""
    compared = {(bench.recipe, bench.row) for bench in BENCHES}
    for recipe in {bench.recipe for bench in BENCHES}:
        lines = (ROOT / "recipes" / recipe / "README.md").read_text().splitlines()
        for at, line in enumerate(lines):
            if not line.startswith("|---") or not re.search("GiB.*s/|s/.*GiB|s/step", lines[at - 1]):
                continue
            rows = itertools.takewhile(lambda row: row.startswith("|"), lines[at + 1 :])
            rows = [row for row in rows if not re.search("not measured|reported|recipe qwen", row)]
            known = [row for row in rows if any(row.startswith(own) for name, own in compared if name == recipe)]
            assert rows == known, set(rows) - set(known)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "fits"), [("debug", True), ("full_1gpu", True), ("full", False)])
def test_what_does_not_fit_stops_with_a_way_out(name, fits, monkeypatch, tmp_path, capsys):
    """Catches a config whose header promises one card of 80 GB and which is refused there, and a refusal that names no
    way out, or comes after something big was loaded."""
    recipe = ROOT / "recipes/qwenimage_fulltune"
    train = load_script(recipe / "train.py")
    argv = ["--config", str(recipe / f"configs/{name}.yaml"), "--train_data_dir", "given", "--plan", "--gpus", "1x80"]
    cfg = parse_recipe(train.Config, [*argv, "--output_dir", str(tmp_path)])
    monkeypatch.setattr(plan, "traced_size", traced_once)
    monkeypatch.setattr(needs, "available", lambda: needs.Machine(1, 79.1, "NVIDIA H100 80GB HBM3", 200.0))
    monkeypatch.setenv("LAUNCH", "single")
    run = launch.set_up(cfg, recipe, argv)
    cfg.run.plan = False  # as a run would, whose processes have started
    folder = recipe / "full_size/transformer"
    model = train.loading.empty_model(train.QwenImageTransformer2DModel, train.folders.part_config(folder))
    check = functools.partial(plan.check_size, run, cfg, model, train.loading.config_of(model))
    if fits:
        check(train.random_sample, train.trial)
        return
    with pytest.raises(ValueError, match=r"needs about \d+ GiB a GPU, this one has 79; what fits: .*--") as refused:
        check(train.random_sample, train.trial)
    assert "activations" in capsys.readouterr().out and "--ignore_plan" in str(refused.value)
    cfg.run.ignore_plan = True
    check(train.random_sample, train.trial)
