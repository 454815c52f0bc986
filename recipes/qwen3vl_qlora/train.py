"""QLoRA fine-tuning of Qwen3-VL (Qwen3VLForConditionalGeneration): a 4-bit base that stays as it is, small adapters on
the attention of its language model. From one V100 32GB up. Read it top to bottom.

    bash run.sh                                            the tiny model and drawn faces, on any machine
    bash run.sh full --train_data_dir DATA --task forward  the real model, on the machine that configs/full.yaml names

Order: Config, model, compute_loss, validate, save, main with the loop. Rows and labels are in conversations.py, the
learning rate's plateau schedule in plateau.py, loading the base in base.py.
"""

import dataclasses
import json
import math
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

RECIPE = Path(__file__).resolve().parent
REPOSITORY = next(folder for folder in RECIPE.parents if (folder / "common").is_dir())
sys.path[:0] = [str(RECIPE), str(REPOSITORY)]

import torch
from base import DTYPES, load_base, prepare_base
from bitsandbytes.nn import Linear4bit, Params4bit
from conversations import IGNORE_INDEX, Conversations, Row, Rows, collate, encode, load_all_rows, resolve_pools
from peft import LoraConfig, PeftModel, get_peft_model
from plateau import Schedule, next_schedule, plateau_warning
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor

from common import runtime
from common.checkpoint import RESULTS, claim_output_dir, find_checkpoint, load_checkpoint, save_checkpoint
from common.config import changed_settings, parse_config, save_config
from common.data import MicroBatchSampler, Place, data_digest, make_loader
from common.folders import model_folder, resolve_paths
from common.limits import explained_errors
from common.metrics import Meter, append_row, print_benchmark, read_rows, write_environment
from common.optimizers import build_optimizer
from common.runtime import Run, on_main
from common.steps import assert_ranks_agree, clip_gradients, lr_factor, seed_step, set_learning_rate

LENGTH_BUCKET = 64  # tokens; rows of one bucket share a micro-batch with --group_by_length
# none of the vision tower, whose layers are named qkv and proj
TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj)"
MEMORY_ADVICE = (
    "In this order, try: --gradient_checkpointing; --train_batch_size 1 with --global_batch_size; "
    "a smaller --max_pixels or --max_length; a smaller --lora_rank; a smaller model of the family"
)
FULL_SIZE = {  # Qwen/Qwen3-VL-32B-Instruct's config.json: 33.36 billion parameters
    "text_config": {
        "vocab_size": 151936,
        "hidden_size": 5120,
        "intermediate_size": 25600,
        "num_hidden_layers": 64,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5e6,
            "mrope_section": [24, 20, 20],
            "mrope_interleaved": True,
        },
    },
    "vision_config": {
        "depth": 27,
        "hidden_size": 1152,
        "num_heads": 16,
        "intermediate_size": 4304,
        "out_hidden_size": 5120,
        "deepstack_visual_indexes": [8, 16, 24],
    },
}


@dataclass
class Config:
    """Every setting of the recipe. `configs/*.yaml` sets them, flags on the command line override."""

    pretrained_model_name_or_path: str = "Qwen/Qwen3-VL-32B-Instruct"
    """local folder or a hub name; "tiny" is the embedded model that make_tiny.py builds"""
    train_data_dir: str | None = None
    """folder of the training images; manifest paths are relative to it; "tiny" is the embedded drawn data"""
    train_data_meta: str | None = None
    """manifest, where it is not found by its usual names in train_data_dir"""
    task: Literal["forward", "reverse"] = "forward"
    """train on <task>_train.jsonl: picture -> description, or description and picture -> Correct or Wrong"""
    face_retention_pool: str | None = None
    """folder made by generate_face_retention_pool.py, mixed in so that what the base can do is kept; may be relative
    to train_data_dir"""
    object_retention_pool: str | None = None
    """folder made by generate_object_retention_pool.py, mixed in likewise"""
    retention_ratio: float = 0.3
    """share of the training rows that come from the pools, drawn by the seed without repetition"""
    output_dir: str = ""
    """where everything is written; outputs/<recipe>/<config> of the repository when empty"""
    overwrite_output_dir: bool = False
    """delete what an earlier run saved in output_dir"""
    on_bad_rows: Literal["error", "skip"] = "error"
    """what a missing, broken or captionless row does: stop with a list, or be left out and listed in bad_rows.jsonl"""
    on_long_rows: Literal["error", "skip"] = "error"
    """what a row of more than max_length tokens does; no row is ever cut, since that could cut through an image"""
    seed: int = 42
    """seed of everything that is drawn at random"""
    launch: str = "single"
    """launch file in accelerate/ that run.sh uses; LAUNCH=... overrides it"""

    max_length: int = 1024
    """tokens of a row at most: images, question, answer and the template around them"""
    min_pixels: int = 64 * 64
    """an image of fewer pixels is enlarged; 32 x 32 pixels are one token"""
    max_pixels: int = 512 * 512
    """an image of more pixels is shrunk; saved with the adapters, so that evaluation does the same"""
    group_by_length: bool = False
    """make each micro-batch of rows of about one length (buckets of 64 tokens): less padding"""
    train_batch_size: int = 1
    """samples a process sees at once"""
    gradient_accumulation_steps: int = 1
    """micro-batches a process adds up before a step"""
    global_batch_size: int = 0
    """samples a step over all processes; when given, it sets gradient_accumulation_steps"""
    gradient_checkpointing: bool = False
    """recompute activations in backward: less memory, a quarter more time"""
    mixed_precision: Literal["bf16", "fp16", "no"] = "bf16"
    """compute in bf16, or in fp16 with a loss scale (adapters on cards without bf16); "no" is float32 throughout"""
    max_train_steps: int = 1000
    """optimizer steps"""
    num_train_epochs: int = 0
    """when given, sets max_train_steps to this many passes over the data, unless the command line gives both"""
    dataloader_num_workers: int = 2
    """processes that prepare batches ahead"""

    quantization: Literal["nf4", "none"] = "nf4"
    """keep the frozen base in 4 bits (NF4 with double quantisation), or in the compute precision"""
    lora_rank: int = 8
    """rank of the LoRA adapters; 0, in recipes that can do without, trains the model's own weights"""
    lora_alpha: int = 16
    """an adapter's output is multiplied by lora_alpha / lora_rank"""
    lora_dropout: float = 0.05
    """dropout of the adapters' inputs"""

    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "flash_adamw", "adafactor"] = "adamw"
    """see common/optimizers.py for memory and where each may run"""
    learning_rate: float = 2.5e-4
    """peak learning rate"""
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant"
    """after the warm-up: constant (two names of one thing), or falling to zero at max_train_steps"""
    lr_warmup_steps: int = 0
    """steps of linear warm-up"""
    lr_warmup_ratio: float = 0.02
    """when lr_warmup_steps is 0, the warm-up as a share of max_train_steps"""
    adam_beta1: float = 0.9
    """AdamW's first beta"""
    adam_beta2: float = 0.999
    """AdamW's second beta"""
    adam_weight_decay: float = 0.01
    """decoupled weight decay"""
    adam_epsilon: float = 1e-8
    """AdamW's epsilon"""
    max_grad_norm: float = 1.0
    """global gradient norm to clip to; 0 does not clip"""
    max_nonfinite_steps: int = 10
    """steps in a row whose loss may be infinite or nan before the run stops with advice; 0 but under fp16, whose loss
    scale skips such steps"""

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
    validation_steps: int = 10_000
    """steps between validations, and one before the first step and at the end; 0 does none"""
    validation_epochs: float = 1.0
    """when given, validation_steps (unless that is 0) is at most this many passes over the data; 0 leaves it alone"""
    max_validation_rows: int = 0
    """rows of the task, and of each retention pool, to validate on at most (the first ones); 0 takes all"""
    best_metric: Literal["validation_loss", "task_accuracy"] = "validation_loss"
    """what best/ is best at: lowest loss, or most answers of which greedy decoding gets every token right"""

    checkpointing_steps: int = 500
    """steps between checkpoints, and one at the end; 0 saves none"""
    checkpoints_total_limit: int = 2
    """newest checkpoints kept; 0 keeps all"""
    resume_from_checkpoint: str | None = None
    """a checkpoint folder, or "latest" """
    evaluate: bool = False
    """run evaluate.py on best/ at the end, in the main process, which then holds the base twice"""
    logging_steps: int = 1
    """steps between rows of metrics.jsonl"""
    report_to: Literal["none", "wandb", "tensorboard"] = "none"
    """tracker; wandb is offline when not logged in; metrics.jsonl and curves.png are always written"""
    tracker_project_name: str = ""
    """project name at the tracker; the recipe folder's name when empty"""
    benchmark: bool = False
    """random weights and inputs of the full size: print throughput, MFU and memory, and stop"""
    benchmark_tokens: int = 512
    """length of the benchmark's rows, of which an image takes up to 196 and the answer 32"""

    gradient_release, ema_decay = False, 0.0  # what common/ asks every recipe for and this one does not have

    def __post_init__(self) -> None:
        if not self.benchmark and self.train_data_dir is None:
            raise ValueError(
                "train_data_dir is not set; pass --train_data_dir FOLDER, as generate_data.py writes it "
                "(or run the tiny config, which brings its own)"
            )
        for name in ("train_batch_size", "gradient_accumulation_steps", "max_train_steps", "lora_rank", "lr_patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.optimizer not in ("adamw", "adamw_8bit", "paged_adamw_8bit"):
            raise ValueError(
                f"optimizer {self.optimizer} is for full tuning; the adapters are small: use adamw or paged_adamw_8bit"
            )
        if not 0 <= self.retention_ratio < 1:
            raise ValueError(f"retention_ratio is a share from 0 to under 1, got {self.retention_ratio}")
        if not 0 < self.lr_reduction_factor < 1:
            raise ValueError(f"lr_reduction_factor must be between 0 and 1, got {self.lr_reduction_factor}")
        if not 32 * 32 <= self.min_pixels <= self.max_pixels:
            raise ValueError(
                f"expected 1024 (one token) <= min_pixels <= max_pixels, got {self.min_pixels} and {self.max_pixels}"
            )
        if self.benchmark and self.benchmark_tokens < 64:
            raise ValueError(f"benchmark_tokens must be at least 64, got {self.benchmark_tokens}")


# ---------------------------------------------------------------- data


class RandomRows(Dataset):
    """Random tokens around one random image, in place of data, for the benchmark."""

    answer_tokens = 32

    def __init__(self, cfg: Config, config: Qwen3VLConfig, group_size: int):
        self.length, self.config, self.step_tokens = cfg.benchmark_tokens, config, group_size * self.answer_tokens
        self.side = min(14, math.isqrt(self.length - self.answer_tokens - 8))  # merged tokens

    def __len__(self) -> int:
        return 64

    def __getitem__(self, place: Place) -> dict:
        rng = torch.Generator().manual_seed(place.sample)
        input_ids = torch.randint(0, 100, (self.length,), generator=rng)
        input_ids[1] = self.config.vision_start_token_id
        input_ids[2 : 2 + self.side**2] = self.config.image_token_id
        labels = torch.full_like(input_ids, IGNORE_INDEX)
        labels[-self.answer_tokens :] = input_ids[-self.answer_tokens :]
        vision = self.config.vision_config
        patch = 3 * vision.temporal_patch_size * vision.patch_size**2
        return {
            "input_ids": input_ids,
            "labels": labels,
            "mm_token_type_ids": (input_ids == self.config.image_token_id).long(),
            "pixel_values": torch.randn(4 * self.side**2, patch, generator=rng),
            "image_grid_thw": torch.tensor([[1, 2 * self.side, 2 * self.side]]),
            "step_tokens": self.step_tokens,
        }


# ---------------------------------------------------------------- model


@dataclass
class Models:
    """What compute_loss, validate and save need."""

    model: nn.Module  # as the strategy wraps it; call this one in training
    config: Qwen3VLConfig
    processor: Qwen3VLProcessor | None
    micro_batches: int  # of a step, over all processes
    schedule: Schedule
    ema: None = None  # no averaged weights in this recipe
    data_digest: str = ""  # of rows and their order, to notice on resume that the data changed
    steps_per_epoch: float = 0.0
    task: list[Row] = field(default_factory=list)  # to validate on
    retention: list[Row] = field(default_factory=list)


def load_processor(cfg: Config, folder: Path) -> Qwen3VLProcessor:
    """The base's processor with this run's image sizes."""
    processor = Qwen3VLProcessor.from_pretrained(folder)
    processor.image_processor.size = {"shortest_edge": cfg.min_pixels, "longest_edge": cfg.max_pixels}
    return processor


def base_folder(name_or_path: str) -> Path:
    """The base's local folder, or the hub's download of it. ValueError when it is neither."""
    path = Path(name_or_path)
    if (path / "config.json").is_file():
        return path
    if path.exists() or name_or_path.count("/") != 1 or name_or_path.startswith(("/", ".", "~")):
        raise ValueError(
            f"pretrained_model_name_or_path {name_or_path!r} is no model folder: it has no config.json; "
            "give a folder as save_pretrained writes it, or a hub name"
        )
    return model_folder(name_or_path, (".",))


@torch.no_grad()
def random_base(config: Qwen3VLConfig, dtype: torch.dtype, device: torch.device) -> Qwen3VLForConditionalGeneration:
    """A base in 4 bits with random weights of a config's size, as load_base would load it: built layer by layer, so
    that no more than one layer is ever there unquantised."""
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation="sdpa")
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and name != "lm_head":
                setattr(module, name, random_linear4bit(child, dtype, device))
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            if p is not None and p.is_meta:
                value = torch.empty(p.shape, device=device, dtype=dtype)
                value = value.normal_(std=0.02) if p.ndim > 1 else value.fill_(1.0 if name == "weight" else 0.0)
                module._parameters[name] = nn.Parameter(value, requires_grad=False)
    language, vision = model.model.language_model, model.model.visual
    language.rotary_emb = type(language.rotary_emb)(config.text_config).to(device)
    vision.rotary_pos_emb = type(vision.rotary_pos_emb)(config.vision_config).to(device)
    model.tie_weights()  # where the config says so
    model.is_loaded_in_4bit = True  # what peft asks
    return model


def random_linear4bit(linear: nn.Linear, dtype: torch.dtype, device: torch.device) -> Linear4bit:
    result = Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=dtype,
        quant_type="nf4",
        compress_statistics=True,
        device="meta",
    )
    weight = torch.empty(linear.weight.shape, device=device, dtype=dtype).normal_(std=0.02)
    result.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True).to(device)
    return result


def add_adapters(base: Qwen3VLForConditionalGeneration, cfg: Config) -> PeftModel:
    """Freeze and prepare the base, put float32 adapters on q, k, v and o of every language layer."""
    base.requires_grad_(False)
    prepare_base(base)
    vision, language = base.model.visual, base.model.language_model
    vision.forward = torch.no_grad()(vision.forward)
    if cfg.gradient_checkpointing:
        language.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(cfg.seed)
    base.name_or_path = cfg.pretrained_model_name_or_path  # what adapter_config.json names as the base
    lora = LoraConfig(
        r=cfg.lora_rank,
        lora_alpha=cfg.lora_alpha,
        lora_dropout=cfg.lora_dropout,
        target_modules=TARGETS,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, lora)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    adapted = {name.split(".lora_")[0] for name in trained}
    layers = base.config.text_config.num_hidden_layers
    assert all(".lora_" in name and ".visual." not in name for name in trained), "something but adapters would train"
    assert len(adapted) == 4 * layers, f"{len(adapted)} adapted layers, expected q, k, v, o of {layers}"
    assert all(p.dtype == torch.float32 for p in trained.values())
    return model


def forward_flops(config: Qwen3VLConfig, batch: int, tokens: int) -> float:
    """FLOPs of the language model's forward over (batch, tokens): matrix products and attention, 2 a multiply-add; the
    vision tower and lm_head, under 3% at 32B, are not counted."""
    text = config.text_config
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


def compute_loss(models: Models, batch: dict, cfg: Config) -> tuple[Tensor, dict]:
    """One micro-batch's loss, and what the meter adds up.

    The mean of this over a step's micro-batches is the mean over the step's answer tokens: a long answer counts by
    its tokens, however the rows are split.
    """
    device = next(models.model.parameters()).device
    logits, targets = answer_logits(models.model, batch, device)  # (B, K, V), (B, K)
    token_loss_sum = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    loss = token_loss_sum * models.micro_batches / batch["step_tokens"]
    # frozen weights have no weight gradient: a step is two forwards' worth of products, and the meter counts three
    flops = forward_flops(models.config, *batch["input_ids"].shape) * 2 / 3
    return loss, {"forward_flops": flops, "samples": len(targets)}


# ---------------------------------------------------------------- validation


@torch.no_grad()
def measure(run: Run, models: Models, rows: list[Row], batch_size: int) -> tuple[float, float] | None:
    """(loss, accuracy) of rows over all processes: mean token loss, and the share of rows whose every answer token is
    the most likely one, which is what greedy decoding needs to give the answer. None without rows.

    Rows of like length share a batch. Processes need not do equally many: nothing is exchanged before the end.
    """
    if not rows:
        return None
    model = run.unwrap(models.model)
    total = torch.zeros(4, dtype=torch.float64, device=run.device)  # loss, tokens, right rows, rows
    order = sorted(range(len(rows)), key=lambda index: rows[index].length)
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    for indices in batches[run.rank :: run.world_size]:
        batch = collate([encode(rows[index], models.processor) for index in indices])
        logits, targets = answer_logits(model, batch, run.device)  # (B, K, V), (B, K)
        losses = cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORE_INDEX, reduction="none")  # (B, K)
        labelled = targets != IGNORE_INDEX
        right = ((logits.argmax(-1) == targets) | ~labelled).all(dim=1)  # (B,)
        total += torch.stack([losses.double().sum(), labelled.sum(), right.sum(), labelled.any(dim=1).sum()])
    if run.world_size > 1:
        torch.distributed.all_reduce(total)
    loss_sum, tokens, right_rows, n_rows = total.tolist()
    return loss_sum / tokens, right_rows / n_rows


def validate(run: Run, cfg: Config, models: Models, step: int) -> None:
    """Losses and accuracies of task and retention; from them the schedule's next state, and best/ where they are the
    best so far. Every process calls it and comes to the same decision.

    The validation before the first step is written down and decides nothing.
    """
    row = {"step": step, "epoch": round(step / models.steps_per_epoch, 4)}
    row |= {"learning_rate": cfg.learning_rate * lr_factor(max(step - 1, 0), cfg, models.schedule)}
    models.model.eval()
    for name, rows in (("validation", models.task), ("retention", models.retention)):
        if measured := measure(run, models, rows, cfg.train_batch_size):
            row |= {f"{name}_loss": measured[0], f"{name}_accuracy": measured[1]}
    models.model.train()

    schedule, is_best = models.schedule, False
    if step:
        schedule = next_schedule(schedule, row["validation_loss"], cfg)
        value = row["validation_loss"] if cfg.best_metric == "validation_loss" else 1 - row["validation_accuracy"]
        is_best = math.isfinite(value) and (schedule.best is None or value < schedule.best)
    if is_best:
        schedule = dataclasses.replace(schedule, best=value, best_step=step)
        save_adapters(run, cfg, models, "best")
    row |= {"decision": schedule.decision, "learning_rate_factor": schedule.factor}
    if run.is_main:
        row |= {"train_loss": mean_train_loss(cfg, schedule, step)} if step else {}
        append_row(Path(cfg.output_dir) / "validation.jsonl", row)
        if cfg.report_to != "none":
            numbers = {f"validation/{name}": value for name, value in row.items() if isinstance(value, float)}
            run.accelerator.log(numbers, step=step)
        said = ", ".join(f"{k.replace('_', ' ')} {v:.4f}" for k, v in row.items() if k.endswith(("loss", "accuracy")))
        run.print(f"step {step}: {said}; {schedule.decision or 'before training'}{', best so far' * is_best}")
    models.schedule = dataclasses.replace(schedule, history=(*schedule.history, row))
    if run.is_main:
        history = {name: value for name, value in vars(models.schedule).items() if name != "history"}
        history |= {"best_metric": cfg.best_metric, "validations": models.schedule.history}
        (Path(cfg.output_dir) / "training_history.json").write_text(json.dumps(history, indent=1) + "\n")
    run.barrier()
    if schedule.stop_reason:
        runtime.request_stop(schedule.stop_reason)


def resumed_schedule(schedule: Schedule, before: dict, cfg: Config) -> Schedule:
    """The saved state under this run's settings: a stop that was decided by settings that have changed is taken back,
    and best/ begins anew under another measure."""
    deciding = (
        "min_lr",
        "min_val_loss",
        "learning_rate",
        "lr_reduction_factor",
        "lr_patience",
        "improvement_threshold",
    )
    if any(before[name] != getattr(cfg, name) for name in deciding):
        schedule = dataclasses.replace(schedule, stop_reason="")
    if before["best_metric"] != cfg.best_metric:
        schedule = dataclasses.replace(schedule, best=None, best_step=0)
    return schedule


def mean_train_loss(cfg: Config, schedule: Schedule, step: int) -> float:
    """Of the logged steps since the last validation."""
    since = schedule.history[-1]["step"] if schedule.history else 0
    rows = read_rows(Path(cfg.output_dir) / "metrics.jsonl")
    losses = [row["loss"] for row in rows if since < row["step"] <= step]
    return sum(losses) / len(losses) if losses else math.nan


# ---------------------------------------------------------------- saving


def save(
    run: Run, cfg: Config, models: Models, optimizer: torch.optim.Optimizer, sampler: MicroBatchSampler, step: int
) -> None:
    """checkpoint-<step> with all that an exact resume needs: adapters, optimizer, schedule, the sampler's place."""
    state = {"segments": sampler.segments_at(step), "data": models.data_digest, "config": dataclasses.asdict(cfg)}
    state["schedule"] = dataclasses.asdict(models.schedule)
    folder = save_checkpoint(
        run, cfg.output_dir, step, models.model, optimizer, None, state, cfg.checkpoints_total_limit, {}
    )
    run.print(f"saved {folder}")


def save_adapters(run: Run, cfg: Config, models: Models, name: str) -> None:
    """<output_dir>/<name>: adapters as peft reads them, and the processor with this run's image sizes and template."""
    if run.is_main:
        folder = Path(cfg.output_dir) / name
        partial = folder.with_name(f"{name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        run.unwrap(models.model).save_pretrained(partial)
        if models.processor is not None:
            models.processor.save_pretrained(partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    run.barrier()


# ---------------------------------------------------------------- main


def main(argv: list[str] | None = None) -> None:
    cfg = parse_config(Config, argv)
    resolve_paths(cfg, RECIPE, argv)
    resolve_pools(cfg)
    run = runtime.set_up(cfg, RECIPE)
    accelerator, accumulation = run.accelerator, cfg.gradient_accumulation_steps
    if accelerator.scaler is None:  # then nothing skips a step whose loss is not finite
        cfg.max_nonfinite_steps = 0
    resume = on_main(run, find_checkpoint, cfg.output_dir, cfg.resume_from_checkpoint)
    results = (*RESULTS, "best/", "final/", "evaluation/")
    on_main(run, claim_output_dir, cfg.output_dir, resume, cfg.overwrite_output_dir, False, results)

    group_size, dtype = cfg.train_batch_size * accumulation * run.world_size, DTYPES[cfg.mixed_precision]
    if cfg.benchmark:
        processor, rows, config = None, Rows([], [], []), Qwen3VLConfig(**FULL_SIZE)
        base = random_base(config, dtype, run.device)
        dataset, shape_ids = RandomRows(cfg, config, group_size), None
        cfg.validation_steps = 0
    else:
        folder = on_main(run, base_folder, cfg.pretrained_model_name_or_path)
        processor = load_processor(cfg, folder)
        rows = on_main(run, load_all_rows, cfg, processor)
        dataset = Conversations(rows.train, processor)
        shape_ids = [row.length // LENGTH_BUCKET for row in rows.train] if cfg.group_by_length else None
        lengths = [row.length for row in rows.train]
        run.print(
            f"{len(rows.train)} rows to train on, of {min(lengths)} to {max(lengths)} tokens; to validate on "
            f"{len(rows.task)} of the task and {len(rows.retention)} of retention"
        )
        base = load_base(folder, dtype, run.device, cfg.quantization)
    bucket_ids, steps_per_epoch = [0] * len(dataset), len(dataset) / group_size
    if cfg.num_train_epochs:
        cfg.max_train_steps = math.ceil(cfg.num_train_epochs * steps_per_epoch)
    if cfg.validation_epochs and cfg.validation_steps and not cfg.benchmark:
        cfg.validation_steps = min(cfg.validation_steps, max(1, round(cfg.validation_epochs * steps_per_epoch)))
    if not cfg.benchmark:
        every = f"every {cfg.validation_steps}" if cfg.validation_steps else "never"
        run.print(
            f"{cfg.max_train_steps} steps of {group_size} rows, {steps_per_epoch:.1f} an epoch; validation: {every}"
        )
    cfg.lr_warmup_steps = cfg.lr_warmup_steps or math.ceil(cfg.lr_warmup_ratio * cfg.max_train_steps)
    if warning := plateau_warning(cfg):
        run.print(warning)

    adapted = add_adapters(base, cfg)
    optimizer = build_optimizer(adapted, cfg, run.strategy, run.offload)
    model, optimizer = runtime.prepare(run, adapted.train(), optimizer, cfg)
    models = Models(
        model=model,
        config=base.config,
        processor=processor,
        micro_batches=accumulation * run.world_size,
        schedule=Schedule(),
        data_digest=data_digest(rows.train, bucket_ids) if rows.train else "",
        steps_per_epoch=steps_per_epoch,
        task=rows.task,
        retention=rows.retention,
    )

    step, segments = 0, []
    if resume:
        state = load_checkpoint(run, resume, model, optimizer, None)
        step, segments = state["step"], state["segments"]
        models.schedule = Schedule(**{**state["schedule"], "history": tuple(state["schedule"]["history"])})
        run.print(f"resumed from {resume} at step {step}; settings changed since: {changed_settings(state, cfg)}")
        if state["data"] != models.data_digest:
            run.print("the data changed since that checkpoint: the order of samples is not a continuation of it")
        models.schedule = resumed_schedule(models.schedule, state["config"], cfg)
        if models.schedule.stop_reason:
            runtime.request_stop(models.schedule.stop_reason)
    sampler = MicroBatchSampler(
        bucket_ids, cfg.train_batch_size, accumulation, run.rank, run.world_size, cfg.seed, segments, step, shape_ids
    )
    on_main(run, claim_output_dir, cfg.output_dir, resume, cfg.overwrite_output_dir, True, results)
    if run.is_main:
        save_config(cfg, Path(cfg.output_dir) / "config.yaml")
        write_environment(run, cfg)
    meter = Meter(run, cfg, step)
    batches = meter.watch(make_loader(dataset, sampler, collate, cfg.dataloader_num_workers, cfg.seed))
    if step == 0 and cfg.validation_steps:
        validate(run, cfg, models, step)

    first_step = step
    # ---- loop: identical in every recipe ----
    while step < cfg.max_train_steps and not runtime.stop_requested():
        learning_rate = cfg.learning_rate * lr_factor(step, cfg, models.schedule)
        set_learning_rate(optimizer, learning_rate)
        step_loss = torch.zeros((), device=run.device)
        meter.start_step()
        for micro_step in range(step * accumulation, (step + 1) * accumulation):
            batch = next(batches)  # before accumulate(): the end of an epoch must not end an accumulation
            seed_step(cfg.seed, micro_step, run.rank)  # dropout and stochastic rounding; noise is seeded per sample
            with accelerator.accumulate(model):
                loss, metrics = compute_loss(models, batch, cfg)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    grad_norm = clip_gradients(run, model, cfg.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            step_loss += loss.detach() / accumulation
            meter.add(metrics)
        step += 1
        if models.ema:
            models.ema.update(step)
        if step == first_step + 1:
            assert_ranks_agree(run, model)
        meter.log(step, step_loss, learning_rate, grad_norm)
        if cfg.validation_steps and (step == cfg.max_train_steps or step % cfg.validation_steps == 0):
            validate(run, cfg, models, step)
        last = step == cfg.max_train_steps or runtime.stop_requested()
        if cfg.checkpointing_steps and (last or step % cfg.checkpointing_steps == 0):
            save(run, cfg, models, optimizer, sampler, step)
    # ---- end loop ----

    meter.close()
    done = step == cfg.max_train_steps or bool(runtime.stop["reason"])
    if cfg.benchmark:
        print_benchmark(run, cfg)
    elif not done:
        run.print(f"stopped at step {step} as asked; go on with the same command and --resume_from_checkpoint latest")
    else:
        if runtime.stop["reason"]:
            run.print(f"stopped at step {step}: {runtime.stop['reason']}")
        save_adapters(run, cfg, models, "final")
        if models.schedule.best is None:  # nothing was validated
            save_adapters(run, cfg, models, "best")
    accelerator.end_training()  # ends the processes' group too: nothing collective may follow
    if done and run.is_main and not cfg.benchmark:
        if cfg.evaluate:
            evaluate_best(cfg)
        print_next_steps(run, cfg)


def evaluate_best(cfg: Config) -> None:
    """evaluate.py's tables and plots of best/, in <output_dir>/evaluation."""
    import evaluate

    evaluate.main(["--model_path", str(Path(cfg.output_dir) / "best")], alone=True)


def print_next_steps(run: Run, cfg: Config) -> None:
    run.print(
        f"\ndone. Look at\n  {cfg.output_dir}/curves.png and training_history.json\n"
        f"  {cfg.output_dir}/best (adapters, step with the best validation) and final\n"
        f"ask the result, beside the untrained base:\n"
        f"  {sys.executable} {RECIPE / 'evaluate.py'} --model_path {cfg.output_dir}/best\n"
        f"train your own:\n  bash {RECIPE / 'run.sh'} full --train_data_dir DATA"
    )


if __name__ == "__main__":
    with explained_errors(MEMORY_ADVICE):
        main()
