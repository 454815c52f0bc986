"""What a run measures: metrics.jsonl, the tracker, the progress bar, and a benchmark's line."""

import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.processes import Run, on_main, stop
from common.progress import peak_memory_gib, progress_bar, stages, table_of_stages
from common.record import trackers
from common.record.checkpoint import State
from common.record.folder import (
    append_row,
    claim_output_dir,
    keep_rows_until,
    read_rows,
    save_config,
    write_atomically,
    write_environment,
)
from common.record.pictures import draw_curves
from common.record.report import REPORT, write_report
from common.settings import Shared

LOOK_AT = ("validation_images/ (grid.png in each step's folder)", "curves.png")


def start(run: Run, cfg: Shared, state: State, max_nonfinite_steps: int = 0) -> "Meter":
    """Now that nothing can fail any more, delete what an earlier run left where that is wanted, write down settings
    and environment, and begin to measure."""
    asked = cfg.run.resume_from_checkpoint
    on_main(run, claim_output_dir, cfg.run.output_dir, run.resume, cfg.run.overwrite_output_dir, True, asked)
    if run.is_main:
        save_config(cfg, Path(cfg.run.output_dir) / "config.yaml")
        write_environment(run, cfg)
    stop.is_training = True
    return Meter(run, cfg, state.step, max_nonfinite_steps)


class Meter:
    """Counts one step at a time. Every process makes the same calls; the main one writes."""

    def __init__(self, run: Run, cfg: Shared, first_step: int, max_nonfinite_steps: int = 0):
        self.run, self.cfg, self.max_nonfinite_steps = run, cfg, max_nonfinite_steps
        self.folder = Path(cfg.run.output_dir)
        self.drawn, self.drawing_took = 0.0, 0.0  # curves and report, seconds
        half = torch.float16 if run.compute_dtype == torch.float16 else torch.bfloat16
        self.peak_flops = matmul_ceiling(run.device, half)
        self.nonfinite_steps = self.skipped_in_a_row = self.skipped_steps = 0  # skipped by an fp16 run's loss scale
        self.bar: Any = None  # begins with the first step, so that a validation before it does not count
        self.trained_seconds, self.trained_samples = 0.0, 0  # since the last row of stages.jsonl
        self.start_step()
        if run.is_main:
            for name in ("metrics.jsonl", "validation.jsonl"):
                keep_rows_until(self.folder / name, first_step)
            stages.write_to(self.folder / "stages.jsonl", goes_on=first_step > 0)
            rows = read_rows(self.folder / "metrics.jsonl")
            self.skipped_steps = rows[-1].get("skipped_steps", 0) if rows else 0
        trackers.start(run, cfg)
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
        """Agree on the means and write a row; ValueError ends a run whose loss is not finite."""
        row = {"step": step, "loss": 0.0, "learning_rate": learning_rate, "grad_norm": grad_norm}
        row |= self._means(loss)  # waits for the device: the clock below sees the whole step
        seconds = time.perf_counter() - self.began
        row |= {
            "seconds_per_step": seconds,
            "samples_per_second": self.samples * self.run.world_size / seconds,
            "mfu": (2 + self.run.trained_share) * self.forward_flops / (seconds * self.peak_flops),
            "data_wait": self.data_wait,
            "peak_memory_gib": peak_memory_gib(),
        }
        if self.run.accelerator.scaler is not None:
            skipped = self.run.accelerator.optimizer_step_was_skipped
            self.skipped_steps += int(skipped)
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
            row["skipped_steps"] = self.skipped_steps
        self.trained_seconds += seconds
        self.trained_samples += self.samples * self.run.world_size
        if self.bar is None:  # the first step has what compiles, and what is allocated
            self._note_training("compile" if self.cfg.speed.compile else "train")
        if self.run.is_main:
            self._write(row, last=step == self.cfg.batch.max_train_steps or stop.agreed)
        self._show(row)
        self._refuse_nonfinite(row)

    def _means(self, loss: Tensor) -> dict[str, float]:
        """The loss and what compute_loss measured, over all micro-batches and processes."""
        names = sorted(self.sums)
        shared = torch.stack([loss.double(), *(self.sums[name] / self.micro_batches for name in names)])
        if self.run.world_size > 1:
            torch.distributed.all_reduce(shared)
            shared /= self.run.world_size
        return dict(zip(["loss", *names], shared.tolist(), strict=True))

    def _write(self, row: dict[str, Any], last: bool) -> None:
        if not (last or row["step"] == 1 or row["step"] % self.cfg.run.logging_steps == 0):
            return
        append_row(self.folder / "metrics.jsonl", row)
        values = {name: value for name, value in row.items() if name != "step"}
        trackers.log(values, row["step"])
        if time.perf_counter() - self.drawn > max(30, 50 * self.drawing_took):
            self._draw()

    def _note_training(self, name: str = "train") -> None:
        if self.trained_seconds:
            stages.add(name, self.trained_seconds, self.trained_samples, peak_memory_gib())
        self.trained_seconds, self.trained_samples = 0.0, 0

    def _draw(self) -> None:
        """curves.png and report.html, kept current."""
        began = time.perf_counter()
        self._note_training()
        trackers.attempt("curves.png", lambda: draw_curves(self.folder))
        trackers.attempt(REPORT, lambda: write_report(self.folder))
        self.drawn = time.perf_counter()
        self.drawing_took = self.drawn - began

    def _show(self, row: dict[str, Any]) -> None:
        if self.bar is None:
            total, done = self.cfg.batch.max_train_steps, row["step"] - 1
            self.bar = progress_bar(
                desc="train", total=total, initial=done, unit="steps", disable=not self.run.is_main
            )
        shown = {"loss": f"{row['loss']:.4f}", "lr": f"{row['learning_rate']:.1e}"}
        shown |= {"s": f"{row['seconds_per_step']:.2f}"}
        shown |= {"skipped": self.skipped_steps} if self.skipped_steps else {}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update(1)

    def _refuse_nonfinite(self, row: dict[str, Any]) -> None:
        self.nonfinite_steps = 0 if math.isfinite(row["loss"]) else self.nonfinite_steps + 1
        advice = f"lower --learning_rate (got {self.cfg.optim.learning_rate})"
        if self.skipped_in_a_row > 2 * self.max_nonfinite_steps:  # a new scale is found within 16
            raise ValueError(
                f"{self.skipped_in_a_row} steps in a row had gradients that are not finite, at step {row['step']}: "
                f"{advice}, look at the rows with the longest answers, or use --mixed_precision bf16 on a card that "
                "has it"
            )
        if self.nonfinite_steps > self.max_nonfinite_steps:
            raise ValueError(
                f"the loss is {row['loss']} at step {row['step']}: {advice}, keep --max_grad_norm at 1.0, "
                "look at the last rows of metrics.jsonl, and resume from the checkpoint before it"
            )

    def close(self, step: int) -> bool:
        """After the loop: curves, a benchmark's line, or how to go on. Whether there is a result to export."""
        if self.bar is not None:
            self.bar.close()
        if self.run.is_main and (self.folder / "metrics.jsonl").is_file():
            self._draw()
        trackers.end()
        if self.run.benchmark:
            print_benchmark(self.run, self.cfg)
            return False
        if stop.reason:
            self.run.print(f"stopped at step {step}: {stop.reason}")
        elif step < self.cfg.batch.max_train_steps:
            self.run.print(
                f"\n{table_of_stages()}\n\n"
                f"stopped at step {step} as asked; go on with the same command and --resume_from_checkpoint latest"
            )
            return False
        return True


def of_latents(latents: Tensor) -> dict[str, Any]:
    """What every image recipe's compute_loss measures of a micro-batch (B, ...)."""
    return {"latents_mean": latents.mean(), "latents_std": latents.std(), "samples": len(latents)}


def log_validation(run: Run, cfg: Shared, step: int, loss: float | None, **more: float) -> None:
    """A row of validation.jsonl; None without held-out rows writes none."""
    if run.is_main and loss is not None:
        row = {"validation_loss": loss, **more}
        append_row(Path(cfg.run.output_dir) / "validation.jsonl", {"step": step, **row})
        trackers.log({f"validation/{name}": value for name, value in row.items()}, step)
        said = "".join(f", {name.replace('_', ' ')} {value:.4f}" for name, value in more.items())
        run.print(f"step {step}: held-out loss {loss:.4f}{said}")
    run.barrier()


def print_next_steps(run: Run, cfg: Shared, look_at: Sequence[str], commands: Mapping[str, str]) -> None:
    """The last words of a run. look_at: what is in output_dir; commands: what for -> a script of the recipe with its
    arguments, {run} standing for output_dir."""
    folder, recipe = cfg.run.output_dir, run.recipe_dir
    whole = {
        what: f"{sys.executable} {recipe / command.replace('{run}', folder)}" for what, command in commands.items()
    }
    words = [f"\n{table_of_stages()}", "\ndone. Look at", *(f"  {folder}/{name}" for name in (REPORT, *look_at))]
    whole["train your own"] = f"bash {recipe / 'run.sh'} full --train_data_dir /data/mine"
    for purpose, command in whole.items():
        words += [f"{purpose}:", f"  {command}"]
    run.print("\n".join(words))
    if run.is_main:
        write_atomically(Path(folder) / "next_steps.json", json.dumps(whole, indent=1) + "\n")
        trackers.attempt(REPORT, lambda: write_report(Path(folder)))


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


def print_benchmark(run: Run, cfg: Shared) -> None:
    """One JSON line from metrics.jsonl: medians after the first quarter of the steps (compilation, allocation)."""
    if not run.is_main:
        return
    rows = read_rows(Path(cfg.run.output_dir) / "metrics.jsonl")
    rows = rows[len(rows) // 4 :]
    seconds = statistics.median(row["seconds_per_step"] for row in rows)
    per_gpu = cfg.batch.train_batch_size * cfg.batch.gradient_accumulation_steps
    result = {
        "device": torch.cuda.get_device_name() if run.device.type == "cuda" else "cpu",
        "launch": run.launch,
        "processes": run.world_size,
        "optimizer": cfg.tuning.optimizer,
        "gradient_release": cfg.tuning.gradient_release,
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
