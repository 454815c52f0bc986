"""What a run writes and shows: metrics.jsonl, tracker, progress bar, curves.png, picture grids, environment.json."""

import contextlib
import dataclasses
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm.auto import tqdm

from common import runtime
from common.runtime import Run


class Meter:
    """Counts one step at a time. Every process makes the same calls; the main one writes."""

    def __init__(self, run: Run, cfg, first_step: int):
        self.run, self.cfg = run, cfg
        self.folder = Path(cfg.output_dir)
        self.curve_drawn = 0.0
        self.peak_flops = matmul_ceiling(
            run.device, torch.float16 if cfg.mixed_precision == "fp16" else torch.bfloat16
        )
        self.nonfinite_steps = self.skipped_in_a_row = self.skipped_steps = 0  # skipped by an fp16 run's loss scale
        self.bar: tqdm | None = None  # begins with the first step, so that a validation before it does not count
        self.start_step()
        if run.is_main:
            for name in ("metrics.jsonl", "validation.jsonl"):
                keep_rows_until(self.folder / name, first_step)
            rows = read_rows(self.folder / "metrics.jsonl")
            self.skipped_steps = rows[-1].get("skipped_steps", 0) if rows else 0
        if cfg.report_to != "none":
            settings = {name: str(value) for name, value in dataclasses.asdict(cfg).items()}
            project = cfg.tracker_project_name or run.recipe_dir.name
            run.accelerator.init_trackers(project, settings, {"wandb": {"dir": cfg.output_dir}})
        if run.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def start_step(self) -> None:
        """Start the clock: what happens between steps (saving, validation) is not counted in seconds_per_step."""
        self.began = time.perf_counter()
        self.data_wait, self.forward_flops, self.samples, self.micro_batches = 0.0, 0.0, 0, 0
        self.sums: dict[str, Tensor] = {}

    def watch(self, batches: Iterator) -> Iterator:
        """Pass batches on and count the seconds spent waiting for them."""
        while True:
            began = time.perf_counter()
            batch = next(batches)
            self.data_wait += time.perf_counter() - began
            yield batch

    def add(self, metrics: dict[str, Any]) -> None:
        """Take one micro-batch's metrics: forward_flops and samples are added up, tensors averaged over micro-batches
        and processes."""
        self.forward_flops += metrics.pop("forward_flops")
        self.samples += metrics.pop("samples")
        self.micro_batches += 1
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach().double()

    def log(self, step: int, loss: Tensor, learning_rate: float, grad_norm: float) -> None:
        """Agree on the means and on a stop signal, write a row; ValueError ends a run whose loss is not finite."""
        names = sorted(self.sums)
        asked = torch.tensor(float(runtime.stop["asked"]), device=loss.device)
        shared = torch.stack(
            [loss.double(), *(self.sums[name] / self.micro_batches for name in names), asked.double()]
        )
        if self.run.world_size > 1:
            torch.distributed.all_reduce(shared)
            shared /= self.run.world_size
        numbers = shared.tolist()  # waits for the device: the clock below sees the whole step
        seconds = time.perf_counter() - self.began
        runtime.stop["agreed"] = numbers[-1] > 0
        row = {"step": step, "loss": numbers[0], "learning_rate": learning_rate, "grad_norm": grad_norm}
        row |= dict(zip(names, numbers[1:-1], strict=True))
        row |= {
            "seconds_per_step": seconds,
            "samples_per_second": self.samples * self.run.world_size / seconds,
            "mfu": 3 * self.forward_flops / (seconds * self.peak_flops),
            "data_wait": self.data_wait,
            "peak_memory_gib": peak_memory_gib(self.run.device),
        }
        if self.run.accelerator.scaler is not None:
            skipped = self.run.accelerator.optimizer_step_was_skipped
            self.skipped_steps += int(skipped)
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
            row["skipped_steps"] = self.skipped_steps
        last = step == self.cfg.max_train_steps or runtime.stop_requested()
        if self.run.is_main and (last or step == 1 or step % self.cfg.logging_steps == 0):
            append_row(self.folder / "metrics.jsonl", row)
            if self.cfg.report_to != "none":
                self.run.accelerator.log({key: value for key, value in row.items() if key != "step"}, step=step)
            if last or time.perf_counter() - self.curve_drawn > 30:
                draw_curves(self.folder)
                self.curve_drawn = time.perf_counter()
        if self.bar is None:
            self.bar = runtime.progress_bar(
                desc="train", total=self.cfg.max_train_steps, initial=step - 1, disable=not self.run.is_main
            )
        shown = {"skipped": self.skipped_steps} if self.skipped_steps else {}
        self.bar.set_postfix(
            loss=f"{row['loss']:.4f}", lr=f"{learning_rate:.1e}", s=f"{seconds:.2f}", refresh=False, **shown
        )
        self.bar.update(1)
        self.nonfinite_steps = 0 if math.isfinite(row["loss"]) else self.nonfinite_steps + 1
        limit = getattr(self.cfg, "max_nonfinite_steps", 0)
        if self.skipped_in_a_row > 2 * limit:  # a new scale is found within 16
            raise ValueError(
                f"{self.skipped_in_a_row} steps in a row had gradients that are not finite, at step {step}: lower "
                f"--learning_rate (got {self.cfg.learning_rate}), look at the rows with the longest answers, or use "
                "--mixed_precision bf16 on a card that has it"
            )
        if self.nonfinite_steps > limit:
            raise ValueError(
                f"the loss is {row['loss']} at step {step}: lower --learning_rate (got {self.cfg.learning_rate}), "
                "keep --max_grad_norm at 1.0, "
                "look at the last rows of metrics.jsonl, and resume from the checkpoint before it"
            )

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.run.is_main and (self.folder / "metrics.jsonl").is_file():
            draw_curves(self.folder)


def append_row(path: Path, row: dict[str, Any]) -> None:
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def keep_rows_until(path: Path, step: int) -> None:
    """On resume, drop rows after the checkpoint's step, so that the file reads as one straight run; on a fresh start,
    all of them."""
    if path.is_file():
        rows = [row for row in read_rows(path) if row["step"] <= step] if step else []
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def matmul_ceiling(device: torch.device, gpu_dtype: torch.dtype = torch.bfloat16) -> float:
    """Measured matrix-product rate in FLOP/s (8192 cubed in half precision on a GPU, float32 512 cubed on a CPU): what
    MFU is a share of."""
    on_cuda = device.type == "cuda"
    size, dtype = (8192, gpu_dtype) if on_cuda else (512, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(10):
        began = time.perf_counter()
        a @ b
        if on_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / statistics.median(seconds[2:])


def peak_memory_gib(device: torch.device) -> float:
    """GiB in use at most so far: on a GPU what torch allocated, on a CPU the process's largest resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def draw_curves(folder: Path) -> None:
    """curves.png: loss (smoothed, and held out), learning rate, gradient norm and samples a second, by step.

    Dashed lines stand where a validation reduced the learning rate or ended the run.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows, held_out = read_rows(folder / "metrics.jsonl"), read_rows(folder / "validation.jsonl")
    steps = [row["step"] for row in rows]
    figure, axes = pyplot.subplots(2, 2, figsize=(12, 7), constrained_layout=True)
    for axis, name in zip(axes.flat, ["loss", "learning_rate", "grad_norm", "samples_per_second"], strict=True):
        axis.plot(steps, [row[name] for row in rows], linewidth=0.8, alpha=0.4 if name == "loss" else 1.0)
        axis.set(title=name.replace("_", " "), xlabel="step")
        axis.grid(alpha=0.3)
    axes[0, 0].plot(steps, smoothed([row["loss"] for row in rows]), label="loss, smoothed")
    for name in sorted({name for row in held_out for name in row if name.endswith("_loss")}):
        points = [(row["step"], row[name]) for row in held_out if name in row]
        axes[0, 0].plot(*zip(*points, strict=True), "o-", markersize=3, label=name.replace("_", " "))
    for row in held_out:  # what a schedule with state decided
        if row.get("decision") in ("reduce", "stop"):
            for axis in axes[0]:
                axis.axvline(row["step"], color="black", linestyle="--", linewidth=0.8)
            place = {"transform": axes[0, 1].get_xaxis_transform(), "ha": "right", "va": "top"}
            axes[0, 1].text(row["step"], 0.97, row["decision"], rotation=90, fontsize=8, **place)
    axes[0, 0].legend()
    figure.savefig(folder / "curves.png.partial", format="png", dpi=90)
    pyplot.close(figure)
    os.replace(folder / "curves.png.partial", folder / "curves.png")


def smoothed(values: Sequence[float], weight: float = 0.05) -> list[float]:
    """Exponential average of a series, started at the mean of its first values."""
    average = statistics.fmean(values[:10]) if values else 0.0
    result = []
    for value in values:
        average += weight * (value - average)
        result.append(average)
    return result


def save_grid(folder: Path, prompts: Sequence[str], columns: int = 5, side: int = 256) -> None:
    """grid.png: the folder's 000.png, 001.png, ... with their prompts under them; what else belongs to a prompt
    (000_source_0.png, 000_target.png) stands left of its picture."""
    strips = [[*sorted(folder.glob(f"{i:03d}_*.png")), folder / f"{i:03d}.png"] for i in range(len(prompts))]
    width = max(map(len, strips)) * side  # of one prompt's pictures
    columns = min(max(1, columns * side // width), len(prompts))
    rows = -(-len(prompts) // columns)
    grid = Image.new("RGB", (columns * (width + 8), rows * (side + 44)), "white")
    draw = ImageDraw.Draw(grid)
    for index, (prompt, strip) in enumerate(zip(prompts, strips, strict=True)):
        left, top = index % columns * (width + 8) + 4, index // columns * (side + 44) + 4
        for place, file in enumerate(strip):
            image = Image.open(file)
            resampling = Image.Resampling.NEAREST if image.width < side // 2 else Image.Resampling.LANCZOS
            scale = side / max(image.size)
            image = image.resize((round(image.width * scale), round(image.height * scale)), resampling)
            grid.paste(image, (left + place * side, top))
        lines = textwrap.wrap(prompt, width // 6)
        draw.multiline_text((left, top + side + 2), "\n".join(lines[:2] + ["..."] * (len(lines) > 2)), fill="black")
    grid.save(folder / "grid.png")


def print_benchmark(run: Run, cfg) -> None:
    """One JSON line from metrics.jsonl: medians after the first quarter of the steps (compilation, allocation)."""
    if not run.is_main:
        return
    rows = read_rows(Path(cfg.output_dir) / "metrics.jsonl")
    rows = rows[len(rows) // 4 :]
    seconds = statistics.median(row["seconds_per_step"] for row in rows)
    per_gpu = cfg.train_batch_size * cfg.gradient_accumulation_steps
    result = {
        "device": torch.cuda.get_device_name() if run.device.type == "cuda" else "cpu",
        "launch": run.launch,
        "processes": run.world_size,
        "optimizer": cfg.optimizer,
        "gradient_release": cfg.gradient_release,
        "batch": per_gpu,
        "seconds_per_step": round(seconds, 4),
        "seconds_per_sample_per_gpu": round(seconds / per_gpu, 4),
        "mfu": round(statistics.median(row["mfu"] for row in rows), 3),
        "data_wait": round(statistics.median(row["data_wait"] for row in rows), 4),
        "peak_memory_gib": round(max(row["peak_memory_gib"] for row in rows), 1),
    }
    if run.device.type == "cuda":  # with what the allocator keeps, and CUDA graphs' memory between replays
        result["peak_reserved_gib"] = round(torch.cuda.max_memory_reserved() / 2**30, 1)
    print(json.dumps(result), flush=True)


def write_environment(run: Run, cfg) -> None:
    """environment.json: versions, commit, hardware, launch file and command, for whoever repeats the run."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for name in "torch diffusers transformers accelerate deepspeed peft bitsandbytes flashoptim safetensors".split():
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=run.recipe_dir, capture_output=True, text=True)
    facts = {
        "versions": versions,
        "python": platform.python_version(),
        "commit": git.stdout.strip() or None,
        "processes": run.world_size,
        "launch": run.launch,
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else platform.processor() or platform.machine(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }
    (Path(cfg.output_dir) / "environment.json").write_text(json.dumps(facts, indent=2) + "\n")
