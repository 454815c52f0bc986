"""QLoRA fine-tuning of Qwen3-VL (Qwen3VLForConditionalGeneration): a 4-bit base that stays as it is, small adapters on
the attention of its language model. From one V100 32GB up. Read it top to bottom.

    bash run.sh                                            the tiny model and drawn faces, on any machine
    bash run.sh full --train_data_dir DATA --task forward  the real model, on the machine that configs/full.yaml names
    python train.py --config FILE --name N --task forward  to outputs/N_forward of the working directory

Order: Config, data, model, loss, validation, saving, main with the loop. Rows and labels are in conversations.py, the
learning rate's plateau schedule in plateau.py, loading the base in quantized_base.py. The settings that all recipes
share are in common/settings.py.
"""

import functools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

RECIPE = Path(__file__).resolve().parent
sys.path[:0] = [str(RECIPE), str(next(folder for folder in RECIPE.parents if (folder / "common").is_dir()))]

import common.quiet  # noqa: F401, isort: skip
import plateau
import torch
from conversations import IGNORE_INDEX, Conversations, Row, collate, encode, load_all_rows, pool_folder
from peft import LoraConfig, PeftModel, get_peft_model
from quantized_base import empty_base, find_base, load_base, prepare_base, random_base
from qwen3vl_names import SECOND_NAMES
from saved_adapters import write_adapters
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor
from two_way_evaluation import Evaluation, run_evaluation

from common import rules, settings
from common.data import loader, order
from common.model.ema import evaluating
from common.processes import Run, on_main
from common.record import checkpoint, metrics
from common.start import config, dry_run, folders, launch, plan
from common.step import optimizers, steps

LENGTH_BUCKET = 64  # tokens; rows of one bucket share a micro-batch with --group_by_length
BENCHMARK_ANSWER = 32  # tokens
# none of the vision tower, whose layers are named qkv and proj
ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj")
TARGETS = rf".*language_model.*\.({'|'.join(ADAPTED)})"
MEMORY_ADVICE = (
    "In this order, try: --gradient_checkpointing; --train_batch_size 1 with --global_batch_size; "
    "a smaller --max_pixels or --max_length; a smaller --lora_rank; a smaller model of the family"
)
LOOK_AT = ("curves.png and training_history.json", "best (adapters, the step with the best validation) and final")
NEXT_STEPS = {"ask the result, beside the untrained base": "evaluate.py --model_path {run}/best"}


@dataclass
class Config:
    """This recipe's settings: its own, and the groups of common/settings.py. All flags are flat."""

    pretrained_model_name_or_path: str = "Qwen/Qwen3-VL-32B-Instruct"
    """local folder or a hub name; "tiny" is the embedded model that make_tiny.py builds"""
    task: Literal["forward", "reverse"] = "forward"
    """train on <task>_train.jsonl: picture -> description, or description and picture -> Correct or Wrong"""
    name: str = ""
    """when given, output_dir is outputs/<name>_<task> of the working directory, unless that is given too"""
    face_retention_pool: str | None = None
    """folder made by generate_face_retention_pool.py, mixed in so that what the base can do is kept; relative
    to train_data_dir or to the working directory"""
    object_retention_pool: str | None = None
    """folder made by generate_object_retention_pool.py, mixed in likewise"""
    retention_ratio: float = 0.3
    """share of the training rows that come from the pools, drawn by the seed without repetition"""
    on_long_rows: Literal["error", "skip"] = "error"
    """what a row of more than max_length tokens does; no row is ever cut, since that could cut through an image"""
    max_length: int = 1024
    """tokens of a row at most: images, question, answer and the template around them"""
    min_pixels: int = 64 * 64
    """an image of fewer pixels is enlarged; 32 x 32 pixels are one token"""
    max_pixels: int = 512 * 512
    """an image of more pixels is shrunk; saved with the adapters, so that evaluation does the same"""
    group_by_length: bool = False
    """make each micro-batch of rows of about one length (buckets of 64 tokens): less padding"""

    quantization: Literal["nf4", "none"] = "nf4"
    """keep the frozen base in 4 bits (NF4 with double quantisation), or in the compute precision"""
    lora_rank: int = 8
    """rank of the LoRA adapters; 0, in recipes that can do without, trains the model's own weights"""
    lora_alpha: int = 16
    """an adapter's output is multiplied by lora_alpha / lora_rank"""
    lora_dropout: float = 0.05
    """dropout of the adapters' inputs"""
    target_modules: tuple[str, ...] = ADAPTED
    """layers of the language model that get adapters: these four, in any order"""

    lr_warmup_ratio: float = 0.02
    """when lr_warmup_steps is 0, the warm-up as a share of max_train_steps"""
    max_nonfinite_steps: int = 10
    """steps in a row whose loss may be infinite or nan before the run stops with advice; none but under fp16, whose
    loss scale skips such steps"""
    improvement_threshold: float = 0.05
    """a validation loss counts as better when it is under the last better one by this share of it"""
    lr_patience: int = 2
    """validations in a row that are not better before the learning rate is reduced"""
    lr_reduction_factor: float = 0.5
    """what the learning rate is then multiplied by"""
    min_lr: float = 6e-5
    """training stops when a reduction would bring the learning rate under this; 0 never stops"""
    min_val_loss: float = 0.2
    """training stops when the validation loss is under this; 0 never stops"""

    validation_epochs: float = 1.0
    """when given, validation_steps (unless that is 0) is at most this many passes over the data; 0 leaves it alone"""
    max_validation_rows: int = 0
    """rows of the task, and of each retention pool, to validate on at most (the first ones); 0 takes all"""
    best_metric: Literal["validation_loss", "task_accuracy"] = "validation_loss"
    """what best/ is best at: lowest loss, or most answers of which greedy decoding gets every token right"""
    evaluate: bool = False
    """do what evaluate.py does with best/ at the end, in the main process, which then holds the base twice"""
    benchmark_tokens: int = 512
    """length of the benchmark's rows, of which an image takes up to 196 and the answer 32"""

    run: settings.Flat[settings.Run] = field(default_factory=settings.Run)
    data: settings.Flat[settings.Data] = field(default_factory=settings.Data)
    batch: settings.Flat[settings.Batch] = field(default_factory=settings.Batch)
    precision: settings.Flat[settings.AdapterPrecision] = field(default_factory=settings.AdapterPrecision)
    speed: settings.Flat[settings.Speed] = field(default_factory=settings.Speed)
    tuning: settings.Flat[settings.AdapterTuning] = field(default_factory=settings.AdapterTuning)
    optim: settings.Flat[settings.Optim] = field(default_factory=lambda: settings.Optim(learning_rate=2.5e-4))
    validation: settings.Flat[settings.Validation] = field(
        default_factory=lambda: settings.Validation(validation_steps=10_000)
    )

    def check(self) -> None:
        rules.at_least(self, 1, "lora_alpha", "lr_patience")
        rules.between(self, 1, 2**18, "max_length")
        rules.between(self, 1, 4096, "lora_rank")
        rules.between(self, 64, 2**18, "benchmark_tokens")
        rules.within(self, 0, 1, "lr_warmup_ratio", "improvement_threshold")
        rules.under_one(self, "lora_dropout", "retention_ratio")
        if not 0 < self.lr_reduction_factor < 1:
            raise ValueError(f"lr_reduction_factor must be between 0 and 1, got {self.lr_reduction_factor}")
        if not 32 * 32 <= self.min_pixels <= self.max_pixels:
            raise ValueError(
                f"expected 1024 (one token) <= min_pixels <= max_pixels, got {self.min_pixels} and {self.max_pixels}"
            )
        if sorted(self.target_modules) != sorted(ADAPTED):
            raise ValueError(
                f"target_modules must be {' '.join(ADAPTED)}, the attention of the language model, in any order; "
                f"got {' '.join(self.target_modules)}; leave it out"
            )
        if self.name and not self.run.output_dir:
            self.run.output_dir = str(Path("outputs", f"{self.name}_{self.task}"))


# ---------------------------------------------------------------- data


def load_processor(cfg: Config, folder: Path) -> Qwen3VLProcessor:
    """The base's processor with this run's image sizes."""
    processor = Qwen3VLProcessor.from_pretrained(folder)
    processor.image_processor.size = {"shortest_edge": cfg.min_pixels, "longest_edge": cfg.max_pixels}
    return processor


def prepare_data(cfg: Config, run: Run, processor: Qwen3VLProcessor) -> loader.Data:
    """Check every row of the task and of the retention pools, draw what is trained on. Rows to validate on: of the
    task in held_out, of retention in shown."""
    cfg.face_retention_pool = pool_folder(cfg.face_retention_pool, cfg.data.train_data_dir)
    cfg.object_retention_pool = pool_folder(cfg.object_retention_pool, cfg.data.train_data_dir)
    rows = on_main(run, load_all_rows, cfg, processor)
    lengths = [row.length for row in rows.train]
    run.print(
        f"{len(rows.train)} rows to train on, of {min(lengths)} to {max(lengths)} tokens; to validate on "
        f"{len(rows.task)} of the task and {len(rows.retention)} of retention"
    )
    bucket_ids = [0] * len(rows.train)
    return loader.Data(
        dataset=Conversations(rows.train, processor),
        bucket_ids=bucket_ids,
        shape_ids=[length // LENGTH_BUCKET for length in lengths] if cfg.group_by_length else None,
        digest=order.data_digest(rows.train, bucket_ids),
        held_out=rows.task,
        shown=rows.retention,
    )


def random_sample(cfg: Config, model_config: Qwen3VLConfig, rng: torch.Generator) -> dict[str, Tensor]:
    """What one encoded row looks like: one image, then random tokens, of which the last are the answer. The
    benchmark's data."""
    side = min(14, math.isqrt(cfg.benchmark_tokens - BENCHMARK_ANSWER - 8))  # of the image, in tokens
    input_ids = torch.randint(0, 100, (cfg.benchmark_tokens,), generator=rng)
    input_ids[1] = model_config.vision_start_token_id
    input_ids[2 : 2 + side**2] = model_config.image_token_id
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    labels[-BENCHMARK_ANSWER:] = input_ids[-BENCHMARK_ANSWER:]
    vision = model_config.vision_config
    patch = 3 * vision.temporal_patch_size * vision.patch_size**2
    return {
        "input_ids": input_ids,
        "labels": labels,
        "mm_token_type_ids": (input_ids == model_config.image_token_id).long(),
        "pixel_values": torch.randn(4 * side**2, patch, generator=rng),
        "image_grid_thw": torch.tensor([[1, 2 * side, 2 * side]]),
    }


def count_steps(cfg: Config, run: Run, rows: int) -> None:
    """Fill in what depends on the number of rows: steps, warm-up, and how often to validate."""
    group_size, batch = cfg.batch.samples_a_step(run.world_size), cfg.batch
    batch.max_train_steps = batch.steps_for(rows, run.world_size)
    cfg.optim.lr_warmup_steps = cfg.optim.lr_warmup_steps or math.ceil(cfg.lr_warmup_ratio * batch.max_train_steps)
    every, epoch = "never", rows / group_size
    if run.validates:
        if cfg.validation_epochs:
            most = max(1, round(cfg.validation_epochs * epoch))
            cfg.validation.validation_steps = min(cfg.validation.validation_steps, most)
        every = f"every {cfg.validation.validation_steps}"
    run.print(f"{batch.max_train_steps} steps of {group_size} rows, {epoch:.1f} an epoch; validation: {every}")
    if run.validates and (warning := plateau.plateau_warning(cfg)):
        run.print(warning)


# ---------------------------------------------------------------- model


@dataclass
class Models:
    """What compute_loss and validate call, and what they need of it."""

    model: PeftModel  # as the strategy wraps it; call this one in training
    config: Qwen3VLConfig
    processor: Qwen3VLProcessor | None  # None in a benchmark
    state: checkpoint.State  # validation keeps the schedule in it, for the next checkpoint
    ema: None = None  # adapters are not averaged


def add_adapters(base: Qwen3VLForConditionalGeneration, cfg: Config) -> PeftModel:
    """Freeze and prepare the base, put float32 adapters on q, k, v and o of every language layer."""
    base.requires_grad_(False)
    prepare_base(base)
    vision, language = base.model.visual, base.model.language_model
    vision.forward = torch.no_grad()(vision.forward)
    if cfg.speed.gradient_checkpointing:
        language.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(cfg.run.seed)
    base.name_or_path = cfg.pretrained_model_name_or_path  # what adapter_config.json names as the base
    lora = LoraConfig(
        r=cfg.lora_rank,
        lora_alpha=cfg.lora_alpha,
        lora_dropout=cfg.lora_dropout,
        target_modules=TARGETS,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, lora)
    if cfg.speed.compile:
        torch._dynamo.config.recompile_limit = 64  # training and validation, lengths of rows: each is a variant
        for layer in language.layers:
            layer.compile()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    adapted = {name.split(".lora_")[0] for name in trained}
    layers = base.config.text_config.num_hidden_layers
    assert all(".lora_" in name and ".visual." not in name for name in trained), "something but adapters would train"
    assert len(adapted) == len(cfg.target_modules) * layers, (
        f"{len(adapted)} adapted layers, expected q, k, v, o of {layers}"
    )
    assert all(p.dtype == torch.float32 for p in trained.values())
    return model


def forward_flops(model_config: Qwen3VLConfig, batch: int, tokens: int) -> float:
    """FLOPs of the language model's forward over (batch, tokens): matrix products and attention, 2 a multiply-add; the
    vision tower and lm_head, under 3% at 32B, are not counted."""
    text = model_config.text_config
    heads = text.head_dim * (2 * text.num_attention_heads + 2 * text.num_key_value_heads)
    layer = text.hidden_size * (heads + 3 * text.intermediate_size)
    attention = 2 * tokens * text.num_attention_heads * text.head_dim
    return 2.0 * batch * tokens * text.num_hidden_layers * (layer + attention)


# ---------------------------------------------------------------- loss


def answer_logits(model: nn.Module, batch: dict, device: torch.device) -> tuple[Tensor, Tensor]:
    """(logits (B, K, V) float32, targets (B, K)) at the K positions that any row has a label for.

    The vocabulary is far wider than the model: logits of every position would take more memory than its layers.
    """
    labels = batch["labels"].to(device)  # (B, L)
    positions = (labels[:, 1:] != IGNORE_INDEX).any(dim=0).nonzero()[:, 0]  # (K,); position i predicts token i + 1
    names = ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw")
    inputs = {name: batch[name].to(device) for name in names if name in batch}
    logits = model(**inputs, logits_to_keep=positions, use_cache=False).logits
    return logits.float(), labels[:, positions + 1]


def token_loss_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """What is minimised, summed over answer tokens: logits (B, K, V), targets (B, K). Training and the validation loss
    both call it."""
    return cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")


def compute_loss(models: Models, batch: dict, cfg: Config) -> tuple[Tensor, dict]:
    """One micro-batch's loss, and what the meter adds up.

    The mean of this over a step's micro-batches is the mean over the step's answer tokens: a long answer counts by
    its tokens, however the rows are split.
    """
    device = next(models.model.parameters()).device
    logits, targets = answer_logits(models.model, batch, device)  # (B, K, V), (B, K)
    micro_batches = batch["group_size"] // cfg.batch.train_batch_size  # of the step, over all processes
    loss = token_loss_sum(logits, targets) * micro_batches / batch["step_tokens"]
    # frozen weights have no weight gradient: a step is two forwards' worth of products, and the meter counts three
    flops = forward_flops(models.config, *batch["input_ids"].shape) * 2 / 3
    return loss, {"forward_flops": flops, "samples": len(targets)}


def losses_by_row(models: Models, batch: dict) -> dict[str, Tensor]:
    """(B,) mean loss of each row's answer tokens."""
    logits, targets = answer_logits(models.model, batch, next(models.model.parameters()).device)  # (B, K, V), (B, K)
    sums = torch.stack([token_loss_sum(*row) for row in zip(logits[:, None], targets[:, None], strict=True)])  # (B,)
    return {"answer tokens": sums / (targets != IGNORE_INDEX).sum(dim=1)}


def trial(cfg: Config, run: Run, model: PeftModel, batch: dict) -> list[Tensor]:
    """The loss of a batch on a model without memory: what plan adds up. The vision tower, which keeps nothing, is left
    out."""
    base, tokens = model.base_model.model, cfg.benchmark_tokens if cfg.run.benchmark else cfg.max_length
    if cfg.speed.gradient_checkpointing:
        base.model.language_model.gradient_checkpointing_enable({"use_reentrant": False})
    shape = (len(batch["input_ids"]), tokens)
    embeds = torch.empty(*shape, base.config.text_config.hidden_size, device="meta", dtype=run.compute_dtype)
    positions = torch.zeros(3, *shape, dtype=torch.long, device="meta")
    states = base.model.language_model(inputs_embeds=embeds, position_ids=positions, use_cache=False)[0]  # (B, L, D)
    targets = torch.zeros(len(embeds), BENCHMARK_ANSWER, dtype=torch.long, device="meta")
    return [token_loss_sum(base.lm_head(states[:, -BENCHMARK_ANSWER:]).float(), targets)]


# ---------------------------------------------------------------- validation


@torch.no_grad()
def measure(run: Run, models: Models, rows: Sequence[Row], batch_size: int) -> tuple[float, float] | None:
    """(loss, accuracy) of rows over all processes: mean token loss, and the share of rows whose every answer token is
    the most likely one, which is what greedy decoding needs to give the answer. None without rows.

    Rows of like length share a batch. Processes need not do equally many: nothing is exchanged before the end.
    """
    if not rows:
        return None
    model = run.unwrap(models.model)
    total = torch.zeros(4, dtype=torch.float64, device=run.device)  # loss, tokens, right rows, rows
    by_length = sorted(range(len(rows)), key=lambda index: rows[index].length)
    batches = [by_length[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    for indices in run.progress(run.share_of(batches), "validate"):
        batch = collate([encode(rows[index], models.processor) for index in indices])
        logits, targets = answer_logits(model, batch, run.device)  # (B, K, V), (B, K)
        labelled = targets != IGNORE_INDEX
        right = ((logits.argmax(-1) == targets) | ~labelled).all(dim=1)  # (B,)
        loss_sum = token_loss_sum(logits, targets).double()
        total += torch.stack([loss_sum, labelled.sum(), right.sum(), labelled.any(dim=1).sum()])
    if run.world_size > 1:
        torch.distributed.all_reduce(total)
    loss_sum, tokens, right_rows, n_rows = total.tolist()
    return loss_sum / tokens, right_rows / n_rows


def validate(run: Run, cfg: Config, models: Models, data: loader.Data, step: int) -> None:
    """Losses and accuracies of task and retention; from them the schedule's next state, and best/ where they are the
    best so far. Every process calls it and comes to the same decision.

    The validation before the first step is written down and decides nothing.
    """
    schedule, scale = plateau.schedule_of(models.state), models.state.lr_scale
    rate = steps.learning_rate(max(step - 1, 0), cfg.optim, cfg.batch.max_train_steps, scale)
    epoch = step * cfg.batch.samples_a_step(run.world_size) / len(data)
    row = {"step": step, "epoch": round(epoch, 4), "learning_rate": rate}
    with evaluating(models.model, models.ema):
        for name, rows in (("validation", data.held_out), ("retention", data.shown)):
            if measured := measure(run, models, rows, cfg.batch.train_batch_size):
                row |= {f"{name}_loss": measured[0], f"{name}_accuracy": measured[1]}
    if step:
        schedule = plateau.decide(schedule, row, cfg)
    plateau.record(run, cfg, models.state, schedule, row)
    if step and schedule.best_step == step:
        save_adapters(run, cfg, models, "best", step)
    if schedule.stop_reason:
        run.request_stop(schedule.stop_reason)


# ---------------------------------------------------------------- saving


def save_adapters(run: Run, cfg: Config, models: Models, name: str, step: int) -> None:
    """<output_dir>/<name>: what write_adapters writes of this step."""
    if run.is_main:
        folder, model = Path(cfg.run.output_dir) / name, run.unwrap(models.model)
        write_adapters(folder, model, models.processor, rules.flat(cfg), step)
    run.barrier()


def save_results(run: Run, cfg: Config, models: Models, step: int) -> None:
    """final/, and best/ where nothing was validated."""
    save_adapters(run, cfg, models, "final", step)
    if plateau.schedule_of(models.state).best is None:
        save_adapters(run, cfg, models, "best", step)


def evaluate_best(run: Run, cfg: Config) -> None:
    """evaluate.py's tables and plots of best/, in <output_dir>/evaluation, by the main process alone."""
    if cfg.evaluate and run.is_main:
        run_evaluation(Evaluation(model_path=Path(cfg.run.output_dir) / "best", alone=True))


# ---------------------------------------------------------------- main


def main(argv: list[str] | None = None) -> None:
    cfg = config.parse_recipe(Config, argv, SECOND_NAMES)
    run = launch.set_up(cfg, RECIPE, argv)  # processes, strategy, output folder, the checkpoint to go on from

    folder = folders.model_folder(cfg, run, (".",), RECIPE / "full_size", find_base)
    model_config = Qwen3VLConfig.from_pretrained(folder)
    empty = add_adapters(empty_base(model_config, run.compute_dtype, cfg.quantization), cfg)
    plan.check_size(run, cfg, empty, model_config, random_sample, trial)  # said before the check of the data
    if run.benchmark:
        data, processor = loader.random_data(cfg, model_config, random_sample), None
        base = random_base(model_config, run.compute_dtype, run.device)
    else:
        processor = load_processor(cfg, folder)
        data = prepare_data(cfg, run, processor)
        base = load_base(folder, run.compute_dtype, run.device, cfg.quantization)
    count_steps(cfg, run, len(data))

    adapted = add_adapters(base, cfg).train()  # frozen base; checkpointed, compiled
    optimizer = optimizers.build_optimizer(run, adapted, cfg.tuning.optimizer, cfg.optim)
    model, optimizer = launch.prepare(run, adapted, optimizer)
    state = checkpoint.resume(run, cfg, model, optimizer, None, data.digest, config={})
    plateau.resume(run, cfg, state)
    models = Models(model=model, config=model_config, processor=processor, state=state)
    sampler = loader.make_sampler(data, cfg.batch, run, cfg.run.seed, state.segments, state.step)
    if cfg.run.dry_run:
        losses = functools.partial(losses_by_row, models)
        return dry_run.show(run, cfg, data, sampler, adapted, losses, data.dataset.look_at, collate)
    may_fail = cfg.max_nonfinite_steps if run.accelerator.scaler else 0
    meter = metrics.start(run, cfg, state, may_fail)  # the old run's files go now, when nothing can fail any more
    workers = cfg.data.dataloader_num_workers
    batches = meter.watch(loader.make_loader(data.dataset, sampler, workers, cfg.run.seed, collate))
    step = state.step
    if step == 0 and run.validates:
        validate(run, cfg, models, data, step)

    # ---- loop: identical in every recipe ----
    while step < cfg.batch.max_train_steps and not run.stop_requested():
        learning_rate = steps.learning_rate(step, cfg.optim, cfg.batch.max_train_steps, state.lr_scale)
        steps.set_learning_rate(optimizer, learning_rate)
        step_loss = torch.zeros((), device=run.device)
        meter.start_step()
        for micro_step in range(step * run.accumulation, (step + 1) * run.accumulation):
            batch = next(batches)  # before accumulate(): the end of an epoch must not end an accumulation
            steps.seed_step(cfg.run.seed, micro_step, run.rank)  # dropout and rounding; noise is seeded per sample
            with run.accelerator.accumulate(model):
                loss, measured = compute_loss(models, batch, cfg)
                run.accelerator.backward(loss)
                if run.accelerator.sync_gradients:
                    grad_norm = steps.clip_gradients(run, model, cfg.optim.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            step_loss += loss.detach() / run.accumulation
            meter.add(measured)
        step += 1
        if models.ema:
            models.ema.update(step)
        if step == state.step + 1:
            steps.assert_ranks_agree(run, model)
        run.agree_to_stop()
        meter.log(step, step_loss, learning_rate, grad_norm)
        if run.validates and steps.is_due(step, cfg.validation.validation_steps, cfg.batch.max_train_steps):
            validate(run, cfg, models, data, step)
        checkpoint.save_if_due(run, cfg, model, optimizer, models.ema, sampler, state, step)
    # ---- end loop ----

    has_result = meter.close(step)
    if has_result:
        save_results(run, cfg, models, step)
    run.end()  # nothing collective may follow
    if has_result:
        evaluate_best(run, cfg)
        metrics.print_next_steps(run, cfg, LOOK_AT, NEXT_STEPS)


if __name__ == "__main__":
    with plan.explained_errors(MEMORY_ADVICE):
        main()
