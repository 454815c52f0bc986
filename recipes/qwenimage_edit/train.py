"""Training Qwen-Image-Edit and Qwen-Image-Edit-2509 / 2511 (QwenImageTransformer2DModel): all weights, some modules
or LoRA. Read it top to bottom.

    bash run.sh                                           the tiny model and drawn edits, on any machine
    bash run.sh full --train_data_dir /data/mine          the real model, on the machine that configs/full.yaml names

Order: Config, data, load_models, compute_loss, validate, save and export, main with the loop. Beside it: edits.py
(rows and sizes), encoding.py (latents and prompts, cached), video.py (frames), adapters.py (what trains, LoRA).
"""

import contextlib
import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

RECIPE = Path(__file__).resolve().parent
REPOSITORY = next(folder for folder in RECIPE.parents if (folder / "common").is_dir())
sys.path[:0] = [str(RECIPE), str(REPOSITORY)]

import torch
from accelerate import init_empty_weights
from adapters import add_lora, export_lora, lora_reader, train_matching, without_lora
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
from edits import (
    PIPELINES,
    SMALLEST_SIDE,
    Rows,
    Shown,
    draws,
    fit_target,
    frames_of,
    row_problem,
    shown_row,
    source_problem,
    source_size,
    target_size,
)
from encoding import EncodedEdits, encode, load_vae, load_view, open_cache, what_to_encode
from torch import Tensor
from torch.utils.data import Dataset
from video import check_video

from common import flow_matching as fm
from common import runtime
from common.checkpoint import claim_output_dir, find_checkpoint, load_checkpoint, read_state, save_checkpoint
from common.config import changed_settings, parse_config, save_config
from common.data import MicroBatchSampler, Place, data_digest, describe_buckets, make_loader
from common.export import export_weights
from common.folders import model_folder, read_prompts, resolve_paths
from common.images import check_image, decode_image
from common.limits import check_disk, check_memory, explained_errors
from common.manifest import Record, check_records, hold_out, load_manifest
from common.metrics import Meter, append_row, print_benchmark, save_grid, write_environment
from common.optimizers import build_optimizer
from common.runtime import Run, on_main
from common.sharding import Ema, load_weights, load_weights_zero3, random_reader, safetensors_reader
from common.steps import assert_ranks_agree, clip_gradients, lr_factor, seed_step, set_learning_rate

PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "processor", "scheduler")
VALIDATION_SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)
ACTIVATIONS_GIB = 4.0  # of one 1024 x 1024 target with one source and checkpointing: twice the tokens of no source


@dataclass
class Config:
    """Every setting of the recipe. `configs/*.yaml` sets them, flags on the command line override."""

    pretrained_model_name_or_path: str = "Qwen/Qwen-Image-Edit-2511"
    """local folder or a hub name; "tiny" is the embedded model that make_tiny.py builds"""
    transformer_path: str | None = None
    """another folder of transformer weights to start from, for example export/transformer of an earlier run"""
    train_data_dir: str | None = None
    """folder of the training images; manifest paths are relative to it; "tiny" is the embedded drawn data"""
    train_data_meta: str | None = None
    """manifest, where it is not found by its usual names in train_data_dir"""
    output_dir: str = ""
    """where everything is written; outputs/<recipe>/<config> of the repository when empty"""
    overwrite_output_dir: bool = False
    """delete what an earlier run saved in output_dir"""
    cache_dir: str | None = None
    """where encoded latents and prompts are kept, for several runs if wanted; <output_dir>/embedding_cache if not
    given"""
    on_bad_rows: Literal["error", "skip"] = "error"
    """what a missing, broken or captionless row does: stop with a list, or be left out and listed in bad_rows.jsonl"""
    seed: int = 42
    """seed of everything that is drawn at random"""
    train_mode: Literal["qwen_image_edit", "qwen_image_edit_plus"] = "qwen_image_edit_plus"
    """qwen_image_edit for Qwen-Image-Edit (one source); qwen_image_edit_plus for 2509 and 2511 (one or more)"""
    trainable_modules: tuple[str, ...] = (".",)
    """train the parameters whose names contain one of these: "." is everything, "attn" attention alone"""
    lora_rank: int = 0
    """rank of the LoRA adapters; 0, in recipes that can do without, trains the model's own weights"""
    lora_alpha: int = 16
    """an adapter's output is multiplied by lora_alpha / lora_rank"""
    launch: str = "single"
    """launch file in accelerate/ that run.sh uses; LAUNCH=... overrides it"""

    image_sample_size: int = 1024
    """target area is image_sample_size squared; a multiple of 16 (32 rounds sizes as the pipelines do)"""
    enable_bucket: bool = True
    """train whole targets, grouped by resolution; without it targets are cut to a square, which their sources are
    not"""
    random_hw_adapt: bool = False
    """draw the target's size between 512 and image_sample_size, anew for each step"""
    vae_mini_batch: int = 1
    """pictures of one size that the VAE encodes at once"""
    train_batch_size: int = 1
    """samples a process sees at once"""
    gradient_accumulation_steps: int = 1
    """micro-batches a process adds up before a step"""
    global_batch_size: int = 0
    """samples a step over all processes; when given, it sets gradient_accumulation_steps"""
    gradient_checkpointing: bool = False
    """recompute activations in backward: less memory, a quarter more time"""
    compile: bool = False
    """torch.compile the repeated blocks (about a minute at the start, a third faster on an H100)"""
    mixed_precision: Literal["bf16", "fp16", "no"] = "bf16"
    """compute in bf16, or in fp16 with a loss scale (adapters on cards without bf16); "no" is float32 throughout"""
    max_train_steps: int = 1000
    """optimizer steps"""
    num_train_epochs: int = 0
    """when given, sets max_train_steps to this many passes over the data, unless the command line gives both"""
    dataloader_num_workers: int = 2
    """processes that prepare batches ahead"""

    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "flash_adamw", "adafactor"] = "adamw"
    """see common/optimizers.py for memory and where each may run"""
    use_8bit_adam: bool = False
    """the same as --optimizer adamw_8bit"""
    gradient_release: bool = False
    """step each parameter inside backward and free its gradient; no accumulation, no clipping"""
    learning_rate: float = 5e-6
    """peak learning rate"""
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant"
    """after the warm-up: constant (two names of one thing), or falling to zero at max_train_steps"""
    lr_warmup_steps: int = 0
    """steps of linear warm-up"""
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
    ema_decay: float = 0.0
    """decay (0.999 for example) of averaged weights for validation and export, 4 bytes a parameter; 0 keeps none"""
    nvme_path: str | None = None
    """fast disk for LAUNCH=zero3_nvme; <output_dir>/nvme when not given"""

    timestep_sampling: Literal["uniform", "logit_normal", "mode"] = "logit_normal"
    """how sigma is drawn, before the shift"""
    uniform_sampling: bool = False
    """draw sigma, before the shift, in equal strata over the batch and the processes instead (one a sample of the
    step)"""
    logit_mean: float = 0.0
    """mean of logit_normal"""
    logit_std: float = 1.0
    """standard deviation of logit_normal"""
    mode_scale: float = 1.29
    """scale of mode sampling"""
    timestep_shift: float = 0.0
    """fixed shift of sigma towards noise; 0 takes the checkpoint's, which grows with resolution"""
    loss_weighting: Literal["none", "sigma_sqrt", "cosmap"] = "none"
    """weight of the squared error by sigma"""
    caption_dropout: float = 0.1
    """share of samples trained with the encoded empty caption, for classifier-free guidance"""
    cache_moments: bool = False
    """draw latents from the VAE's posterior at every step instead of taking its mode"""

    checkpointing_steps: int = 500
    """steps between checkpoints, and one at the end; 0 saves none"""
    checkpoints_total_limit: int = 2
    """newest checkpoints kept; 0 keeps all"""
    resume_from_checkpoint: str | None = None
    """a checkpoint folder, or "latest" """
    export_model: bool = True
    """write export/transformer at the end"""
    validation_steps: int = 100
    """steps between validations, and one before the first step and at the end; 0 does none"""
    validation_epochs: float = 0.0
    """when given, validation_steps (unless that is 0) is at most this many passes over the data; 0 leaves it alone"""
    validation_prompts: tuple[str, ...] = ()
    """prompts to draw, or one .txt, .json or .parquet file of prompts (column text or prompt); the captions of four
    held-out rows when not given"""
    validation_image_paths: tuple[str, ...] = ()
    """source image of each validation prompt, several of one prompt joined by commas, '' for text alone"""
    num_validation_samples: int = 8
    """rows held out of training for the validation loss (at most a tenth of the data)"""
    num_inference_steps: int = 30
    """sampling steps of validation pictures"""
    guidance_scale: float = 4.0
    """classifier-free guidance of validation pictures"""
    logging_steps: int = 1
    """steps between rows of metrics.jsonl"""
    report_to: Literal["none", "wandb", "tensorboard"] = "none"
    """tracker; wandb is offline when not logged in; metrics.jsonl and curves.png are always written"""
    tracker_project_name: str = ""
    """project name at the tracker; the recipe folder's name when empty"""
    benchmark: bool = False
    """random weights and inputs of the full size: print throughput, MFU and memory, and stop"""
    benchmark_prompt_tokens: int = 256
    """prompt length of the benchmark"""
    benchmark_sources: int = 1
    """source images of the benchmark"""

    def __post_init__(self) -> None:
        if self.image_sample_size % 16 or self.image_sample_size <= 0:
            nearest = max(16, round(self.image_sample_size / 16) * 16)
            raise ValueError(
                "image_sample_size must be a positive multiple of 16 (VAE 8 x packing 2), "
                f"got {self.image_sample_size}; use {nearest}"
            )
        if self.random_hw_adapt and self.image_sample_size < SMALLEST_SIDE:
            raise ValueError(
                f"random_hw_adapt draws sizes from {SMALLEST_SIDE} to image_sample_size, which is "
                f"{self.image_sample_size}; expected at least {SMALLEST_SIDE}"
            )
        if self.train_data_dir == "":
            self.train_data_dir = "/"  # a manifest of absolute paths
        if self.use_8bit_adam and self.optimizer not in ("adamw", "adamw_8bit"):
            raise ValueError(
                f"use_8bit_adam means --optimizer adamw_8bit, got --optimizer {self.optimizer} too; drop one"
            )
        if self.lora_rank and self.trainable_modules != (".",):
            raise ValueError(
                f"lora_rank {self.lora_rank} trains adapters alone, got trainable_modules "
                f"{' '.join(self.trainable_modules)} too; drop one of them"
            )
        if not self.benchmark and self.train_data_dir is None:
            raise ValueError(
                "train_data_dir is not set; pass --train_data_dir FOLDER "
                "(or run the tiny config, which brings its own)"
            )
        for name in ("train_batch_size", "gradient_accumulation_steps", "max_train_steps", "vae_mini_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.mixed_precision == "fp16":
            raise ValueError(
                "mixed_precision fp16 is for adapters: this model's activations overflow it; use bf16, or no"
            )
        if not 0 <= self.caption_dropout <= 1:
            raise ValueError(f"caption_dropout is a share between 0 and 1, got {self.caption_dropout}")
        if self.num_inference_steps < 2:
            raise ValueError(f"num_inference_steps must be at least 2, got {self.num_inference_steps}")


# ---------------------------------------------------------------- data


class RandomEdits(Dataset):
    """Random latents and prompt embeddings of the benchmark's size, in place of encoded data."""

    def __init__(self, cfg: Config, prompt_width: int):
        self.cfg, self.width = cfg, prompt_width

    def __len__(self) -> int:
        return 64

    def __getitem__(self, place: Place) -> dict:
        rng = torch.Generator().manual_seed(place.sample)
        side = self.cfg.image_sample_size // 8
        tensors = {"latents": torch.randn(16, 1, side, side, generator=rng)}
        for which in range(self.cfg.benchmark_sources):  # the pipelines size them to 1024 x 1024, whatever the target
            tensors[f"source_{which}"] = torch.randn(16, 1, 128, 128, generator=rng)
        tensors["prompt_embeds"] = torch.randn(self.cfg.benchmark_prompt_tokens, self.width, generator=rng)
        return {**tensors, "step": place.step, "position": place.position, "group_size": len(place.group)}


def collate(samples: list[dict]) -> dict:
    """One micro-batch: latents (B, 16, 1, H/8, W/8), source_0, source_1, ... (B, 16, 1, h/8, w/8), prompt embeddings a
    list of (L, D), and each sample's place in the step."""
    names = [name for name in samples[0] if name.startswith(("latents", "posterior_std", "source_"))]
    batch = {name: torch.stack([sample[name] for sample in samples]) for name in names}
    batch["prompt_embeds"] = [sample["prompt_embeds"] for sample in samples]
    places = {"step": samples[0]["step"], "group_size": samples[0]["group_size"]}
    return {**batch, **places, "positions": [sample["position"] for sample in samples]}


def checked(cfg: Config, records: list[Record], known_good: set[str] = frozenset()) -> list[Record]:
    """The rows that can be used as edits; the others are a ValueError or left out, as on_bad_rows says."""
    records = [
        record if record.problem else dataclasses.replace(record, problem=row_problem(record, cfg.train_mode))
        for record in records
    ]
    return check_records(
        records,
        cfg.train_data_dir,
        cfg.on_bad_rows,
        cfg.output_dir,
        known_good,
        types=("image", "video"),
        source_problem=source_problem,
        checks={"video": check_video},
    )


def load_rows(cfg: Config, multiple: int, known_good: set[str]) -> tuple[Rows, Rows]:
    """Checked rows: those to train on, and those held out for the validation loss."""
    records = checked(cfg, load_manifest(cfg.train_data_dir, cfg.train_data_meta), known_good)
    parts = []
    for part in hold_out(records, cfg.num_validation_samples, cfg.seed):
        buckets = [target_size(cfg, (record.width, record.height), multiple) for record in part]
        parts.append(Rows(part, buckets, [frames_of(record, cfg.train_data_dir) for record in part], multiple))
    return parts[0], parts[1]


def read_shown(cfg: Config, held_out: list[Record]) -> list[Shown]:
    """The edits that validation draws: those of the settings, or four held-out rows.

    validation_prompts and validation_image_paths, or a .json manifest of rows as in the training data, whose targets
    are shown too. ValueError when a prompt has no image, or an image cannot be used.
    """
    prompts = read_prompts(cfg.validation_prompts)
    if not prompts:
        return [shown_row(record, cfg.train_data_dir) for record in held_out[:4]]
    file = Path(cfg.validation_prompts[0])
    if file.suffix == ".json" and not cfg.validation_image_paths:
        rows = checked(cfg, load_manifest(cfg.train_data_dir, file.resolve()))
        return [shown_row(record, cfg.train_data_dir) for record in rows]
    if len(cfg.validation_image_paths) != len(prompts):
        raise ValueError(
            f"validation_image_paths has {len(cfg.validation_image_paths)} entries, expected one for each of the "
            f"{len(prompts)} validation prompts (several images of one prompt joined by commas)"
        )
    shown = []
    for prompt, paths in zip(prompts, cfg.validation_image_paths, strict=True):
        files = [Path(path) for path in paths.split(",") if path]
        if problem := row_problem(Record(0, "", prompt, tuple(map(str, files))), cfg.train_mode):
            raise ValueError(f"validation prompt {prompt!r}: {problem}; name it in validation_image_paths")
        for path in files:
            if not path.is_file():
                raise ValueError(f"validation_image_paths names {path}, which is not there; give paths of pictures")
            try:
                problem = source_problem(*check_image(path.read_bytes(), decode=True, max_pixels=2**31))
            except ValueError as error:
                problem = f"cannot be used: {error}"
            if problem:
                raise ValueError(f"validation_image_paths: {path} {problem}")
        shown.append(Shown(prompt, [decode_image(path.read_bytes()) for path in files]))
    return shown


# ---------------------------------------------------------------- models


def warn_of_other_mode(run: Run, cfg: Config, folder: Path) -> None:
    """A checkpoint's model_index.json names its pipeline: with the other one, prompts are encoded in another way."""
    index, own = folder / "model_index.json", PIPELINES[cfg.train_mode].__name__
    named = json.loads(index.read_text()).get("_class_name", own) if index.is_file() else own
    if named != own:
        run.print(f"warning: the checkpoint is {named}'s, and --train_mode {cfg.train_mode} trains for {own}")


def token_side(cfg: Config, folder: Path) -> int:
    """Pixels of a packed token's side: 16, more in a model whose VAE halves more often. ValueError when
    image_sample_size is no multiple of it."""
    multiple = 2 * 2 ** len(AutoencoderKLQwenImage.load_config(folder / "vae")["temperal_downsample"])
    if cfg.image_sample_size % multiple:
        raise ValueError(f"image_sample_size is {cfg.image_sample_size}; this model needs a multiple of {multiple}")
    return multiple


@dataclass
class Models:
    """What compute_loss, validate, save and export need."""

    transformer: torch.nn.Module  # as the strategy wraps it; call this one
    transformer_config: dict
    scheduler_config: dict
    dtype: torch.dtype  # what the transformer computes in
    schedule: None = None  # the learning rate is a function of the step: no state to keep
    trained_share: float = 1.0  # of the parameters
    data_digest: str = ""  # of rows and buckets, to notice on resume that the data changed
    ema: Ema | None = None
    vae: AutoencoderKLQwenImage | None = None
    shown: list[tuple[Shown, Tensor, Tensor]] = dataclasses.field(default_factory=list)  # edit, (L, D), of EMPTY
    held_out: list[dict] = dataclasses.field(default_factory=list)  # encoded rows


def weights_folder(cfg: Config, folder: Path | None) -> Path | None:
    """Where the weights to start from are; None for the benchmark's random ones."""
    return Path(cfg.transformer_path) if cfg.transformer_path else folder and folder / "transformer"


def empty_transformer(cfg: Config, run: Run, folder: Path | None) -> QwenImageTransformer2DModel:
    """The model to train, without memory for its weights. Called before the data is encoded: what is not there or does
    not fit is said at once."""
    weights = weights_folder(cfg, folder)
    if weights and not (weights / "config.json").is_file():
        raise ValueError(f"transformer_path {weights} has no config.json; give a run's export/transformer, say")
    with init_empty_weights():
        transformer = QwenImageTransformer2DModel.from_config(
            QwenImageTransformer2DModel.load_config(weights) if weights else {}
        )
    trains = add_lora(transformer, cfg) if cfg.lora_rank else train_matching(transformer, cfg.trainable_modules)
    run.print(trains)
    trained = transformer.num_parameters(only_trainable=True)
    frozen = transformer.num_parameters() - trained
    check_memory(run, cfg, trained, ACTIVATIONS_GIB, frozen)
    check_disk(run, cfg, trained)
    return transformer


def load_transformer(
    cfg: Config, run: Run, folder: Path | None, transformer: QwenImageTransformer2DModel
) -> QwenImageTransformer2DModel:
    """Fill the model in the strategy's weight dtype, shard by shard; random weights for the benchmark."""
    weights, dtype = weights_folder(cfg, folder), runtime.weights_dtype(cfg, run.strategy.startswith("zero"))
    if cfg.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if cfg.compile:
        torch._dynamo.config.recompile_limit = 64  # training and validation, sizes and masks: each is a variant
        transformer.compile_repeated_blocks()
    transformer = runtime.shard(run, transformer, dtype, cfg).train()
    device = torch.device("cpu") if run.offload else run.device
    names = {without_lora(name) for name in transformer.state_dict() if ".lora_" not in name}
    read = safetensors_reader(weights, names) if weights else random_reader(cfg.seed, device)
    read = lora_reader(read, cfg.seed) if cfg.lora_rank else read
    if run.strategy == "zero3":
        load_weights_zero3(
            transformer, read, dtype, run.device, run.accelerator.state.deepspeed_plugin.deepspeed_config
        )
    else:
        frozen_dtype = torch.bfloat16 if cfg.mixed_precision == "bf16" else None
        load_weights(transformer, read, dtype, device, frozen_dtype)
    return transformer


def forward_flops(config: dict, image_tokens: int, prompt_tokens: int) -> float:
    """FLOPs of one sample's forward (matrix products and attention, 2 a multiply-add); 73.1e12 at 1024 x 1024 with 256
    prompt tokens and no source. Sources count as image tokens."""
    width, layers = config["num_attention_heads"] * config["attention_head_dim"], config["num_layers"]
    tokens = image_tokens + prompt_tokens
    block = 24 * tokens * width**2 + 4 * tokens**2 * width + 24 * width**2
    edges = (
        2
        * width
        * (2 * config["in_channels"] * image_tokens + config["joint_attention_dim"] * prompt_tokens + 256 + 3 * width)
    )
    return layers * block + edges


# ---------------------------------------------------------------- loss


def pack_latents(latents: Tensor) -> Tensor:
    """(B, 16, 1, H, W) -> (B, H/2 * W/2, 64): each token is a 2 x 2 square, channels first."""
    batch_size, channels, _, height, width = latents.shape
    squares = latents.reshape(batch_size, channels, height // 2, 2, width // 2, 2)
    return squares.permute(0, 2, 4, 1, 3, 5).reshape(batch_size, height // 2 * (width // 2), channels * 4)


def pad_prompts(prompts: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """List of (L, D) -> prompt_embeds (B, max L, D) and mask (B, max L), or None when every token is valid, as the
    pipeline passes it."""
    longest = max(len(prompt) for prompt in prompts)
    prompt_embeds = torch.stack(
        [torch.nn.functional.pad(prompt, (0, 0, 0, longest - len(prompt))) for prompt in prompts]
    )
    mask = torch.tensor(
        [[1] * len(prompt) + [0] * (longest - len(prompt)) for prompt in prompts], device=prompt_embeds.device
    )
    return prompt_embeds, None if mask.all() else mask


def predict_velocity(
    models: Models, noisy_latents: Tensor, sigma: Tensor, prompts: list[Tensor], sources: list[Tensor]
) -> Tensor:
    """Call the transformer as the pipeline does: noisy_latents (B, 16, 1, H, W), sigma (B,), sources
    [(B, 16, 1, h, w), ...] -> packed velocity_pred (B, S, 64) of the target's tokens alone."""
    batch_size, device = len(noisy_latents), noisy_latents.device
    images = [noisy_latents, *(source.to(device) for source in sources)]
    prompt_embeds, prompt_embeds_mask = pad_prompts([prompt.to(device, models.dtype) for prompt in prompts])
    velocity_pred = models.transformer(
        hidden_states=torch.cat([pack_latents(each) for each in images], dim=1).to(
            models.dtype
        ),  # (B, S + sources, 64)
        timestep=(sigma * 1000).to(models.dtype) / 1000,  # (B,), rounded as the pipeline rounds its timesteps
        guidance=None,
        encoder_hidden_states_mask=prompt_embeds_mask,  # (B, L) or None
        encoder_hidden_states=prompt_embeds,  # (B, L, D)
        img_shapes=[[(1, each.shape[-2] // 2, each.shape[-1] // 2) for each in images]] * batch_size,
        attention_kwargs={},
        return_dict=False,
    )[0]
    return velocity_pred[:, : noisy_latents.shape[-2] * noisy_latents.shape[-1] // 4]


def sources_of(batch: dict) -> list[Tensor]:
    """The source latents of a micro-batch or of an encoded row, in the manifest's order."""
    return [batch[f"source_{which}"] for which in range(sum(name.startswith("source_") for name in batch))]


def compute_loss(models: Models, batch: dict, cfg: Config) -> tuple[Tensor, dict]:
    """One micro-batch's loss, and what the meter adds up.

    Noise, sigma and dropout depend on (seed, step, position) alone.
    """
    device = next(models.transformer.parameters()).device
    rngs, uniform, _ = draws(cfg, batch["step"], batch["positions"], batch["group_size"])
    latents = batch["latents"].to(device)  # (B, 16, 1, H/8, W/8) float32
    noise = fm.draw_normal(rngs, latents.shape[1:]).to(device)  # (B, 16, 1, H/8, W/8)
    if "posterior_std" in batch:
        latents = latents + batch["posterior_std"].to(device) * fm.draw_normal(rngs, latents.shape[1:]).to(device)
    prompts, sources = batch["prompt_embeds"], sources_of(batch)  # the data set has dropped captions already

    target_tokens = latents.shape[-2] * latents.shape[-1] // 4
    shift = (
        cfg.timestep_shift or torch.tensor(fm.resolution_shift(target_tokens, models.scheduler_config)).exp().item()
    )
    scheme = "uniform" if cfg.uniform_sampling else cfg.timestep_sampling
    sigma = fm.sample_sigmas(uniform, scheme, cfg.logit_mean, cfg.logit_std, cfg.mode_scale)
    sigma = fm.shift_sigmas(sigma, shift).to(device)  # (B,)

    noisy_latents = fm.add_noise(latents, noise, sigma)
    velocity_pred = predict_velocity(models, noisy_latents, sigma, prompts, sources)  # (B, S, 64)
    target = pack_latents(fm.velocity_target(latents, noise))  # (B, S, 64)
    loss = fm.flow_matching_loss(velocity_pred, target, fm.loss_weights(sigma, cfg.loss_weighting))
    image_tokens = target_tokens + sum(source.shape[-2] * source.shape[-1] // 4 for source in sources)
    prompt_tokens = max(len(prompt) for prompt in prompts)
    flops = len(latents) * forward_flops(models.transformer_config, image_tokens, prompt_tokens)
    flops *= (2 + models.trained_share) / 3  # frozen weights have no gradients of their own
    return loss, {
        "latents_mean": latents.mean(),
        "latents_std": latents.std(),
        "forward_flops": flops,
        "samples": len(latents),
    }


# ---------------------------------------------------------------- validation


@torch.no_grad()
def validate(run: Run, cfg: Config, models: Models, step: int) -> None:
    """Pictures by the unmodified pipeline and the held-out loss at fixed sigmas and noise, with averaged weights where
    they are kept.

    Every process calls it and does the same number of forwards: sharded weights are gathered inside forward, so all
    must be in step.
    """
    models.transformer.eval()
    with models.ema.applied() if models.ema else contextlib.nullcontext():
        loss = held_out_loss(run, models, cfg)
        draw_validation_images(run, cfg, models, Path(cfg.output_dir) / "validation_images" / f"step_{step:06d}")
    models.transformer.train()
    if run.is_main and loss is not None:
        append_row(Path(cfg.output_dir) / "validation.jsonl", {"step": step, "validation_loss": loss})
        run.print(f"step {step}: held-out loss {loss:.4f}")
    run.barrier()


def held_out_loss(run: Run, models: Models, cfg: Config) -> float | None:
    """Mean squared error over held-out rows x VALIDATION_SIGMAS, the same noise every time: comparable between steps
    and runs."""
    if not models.held_out:
        return None
    total = torch.zeros(2, dtype=torch.float64, device=run.device)
    for start in range(0, len(models.held_out), run.world_size):
        index = start + run.rank
        row = models.held_out[index % len(models.held_out)]
        latents = row["latents"][None].to(run.device)  # (1, 16, 1, H/8, W/8)
        noise = fm.draw_normal(fm.sample_rngs(cfg.seed, 0, [index]), latents.shape[1:]).to(run.device)
        sources = [source[None] for source in sources_of(row)]
        for value in VALIDATION_SIGMAS:
            sigma = torch.full((1,), value, device=run.device)
            noisy_latents = fm.add_noise(latents, noise, sigma)
            velocity_pred = predict_velocity(models, noisy_latents, sigma, [row["prompt_embeds"]], sources)
            error = (velocity_pred.float() - pack_latents(fm.velocity_target(latents, noise))).pow(2).mean()
            if index < len(models.held_out):  # ranks past the end only keep step
                total += torch.stack([error.double(), torch.ones_like(error).double()])
    if run.world_size > 1:
        torch.distributed.all_reduce(total)
    return (total[0] / total[1]).item()


def draw_validation_images(run: Run, cfg: Config, models: Models, folder: Path) -> None:
    """Source, target where it is known, and prediction of each edit. Process r draws edits r, r + world size, ...; the
    main process then joins them into grid.png."""
    folder.mkdir(parents=True, exist_ok=True)
    pipeline = PIPELINES[cfg.train_mode](
        scheduler=FlowMatchEulerDiscreteScheduler.from_config(models.scheduler_config),
        vae=models.vae,
        text_encoder=None,
        tokenizer=None,
        processor=None,
        transformer=run.unwrap(models.transformer),
    )
    pipeline.set_progress_bar_config(disable=True)
    for start in range(0, len(models.shown), run.world_size):
        index = (start + run.rank) % len(models.shown)
        edit, prompt_embeds, empty = models.shown[index]
        prompt_embeds = prompt_embeds[None].to(run.device, models.dtype)  # (1, L, D)
        empty = empty[None].to(run.device, models.dtype)  # (1, L, D)
        width, height = edit.size(cfg, 2 * pipeline.vae_scale_factor)
        image = pipeline(
            image=edit.sources if cfg.train_mode == "qwen_image_edit_plus" else edit.sources[0],
            prompt_embeds=prompt_embeds,
            prompt_embeds_mask=torch.ones(prompt_embeds.shape[:2], dtype=torch.long, device=run.device),
            negative_prompt_embeds=empty,
            negative_prompt_embeds_mask=torch.ones(empty.shape[:2], dtype=torch.long, device=run.device),
            true_cfg_scale=cfg.guidance_scale,
            width=width,
            height=height,
            num_inference_steps=cfg.num_inference_steps,
            generator=torch.Generator().manual_seed(cfg.seed + index),
        ).images[0]
        if start + run.rank < len(models.shown):
            image.save(folder / f"{index:03d}.png")
            for number, source in enumerate(edit.sources):
                source.resize(source_size(source.size)).save(folder / f"{index:03d}_source_{number}.png")
            if edit.target:
                fit_target(cfg, edit.target, (width, height)).save(folder / f"{index:03d}_target.png")
            (folder / f"{index:03d}.txt").write_text(edit.text + "\n")
    run.barrier()
    if run.is_main and models.shown:
        save_grid(folder, [edit.text for edit, _, _ in models.shown])


# ---------------------------------------------------------------- saving


def save(
    run: Run, cfg: Config, models: Models, optimizer: torch.optim.Optimizer, sampler: MicroBatchSampler, step: int
) -> None:
    """checkpoint-<step> with all that an exact resume needs, and the transformer's config.json for zero_to_bf16."""
    state = {"segments": sampler.segments_at(step), "data": models.data_digest, "config": dataclasses.asdict(cfg)}
    files = {"config.json": json.dumps(models.transformer_config, indent=2)}
    folder = save_checkpoint(
        run, cfg.output_dir, step, models.transformer, optimizer, models.ema, state, cfg.checkpoints_total_limit, files
    )
    run.print(f"saved {folder}")


def export(run: Run, cfg: Config, models: Models) -> None:
    """export/transformer: bf16 safetensors that QwenImageTransformer2DModel.from_pretrained reads, or export/lora that
    a pipeline's load_lora_weights reads; averaged weights where they are kept."""
    folder = Path(cfg.output_dir) / "export"
    files = {"config.json": json.dumps(models.transformer_config, indent=2)}
    with models.ema.applied() if models.ema else contextlib.nullcontext():
        if cfg.lora_rank:
            export_lora(run, models.transformer, folder / "lora")
        else:
            export_weights(run, models.transformer, folder / "transformer", files)


# ---------------------------------------------------------------- main


def main(argv: list[str] | None = None) -> None:
    cfg = parse_config(Config, argv)
    cfg.optimizer = "adamw_8bit" if cfg.use_8bit_adam else cfg.optimizer
    resolve_paths(cfg, RECIPE, argv)
    run = runtime.set_up(cfg, RECIPE)
    accelerator, accumulation = run.accelerator, cfg.gradient_accumulation_steps
    resume = on_main(run, find_checkpoint, cfg.output_dir, cfg.resume_from_checkpoint)
    on_main(run, claim_output_dir, cfg.output_dir, resume, cfg.overwrite_output_dir, False)

    if cfg.benchmark:
        folder, scheduler_config = (
            None,
            {"base_image_seq_len": 256, "max_image_seq_len": 8192, "base_shift": 0.5, "max_shift": 0.9},
        )
    else:
        folder = on_main(run, model_folder, cfg.pretrained_model_name_or_path, PARTS)
    transformer = empty_transformer(cfg, run, folder)
    trained_share = transformer.num_parameters(only_trainable=True) / transformer.num_parameters()
    state = read_state(resume) if resume else {"step": 0, "segments": []}
    if cfg.benchmark:
        prompt_width = transformer.config.joint_attention_dim
        dataset, buckets, shape_ids = RandomEdits(cfg, prompt_width), [(0, 0)] * 64, None
    else:
        warn_of_other_mode(run, cfg, folder)
        scheduler_config = FlowMatchEulerDiscreteScheduler.load_config(folder / "scheduler")
        multiple = token_side(cfg, folder)
        cache = open_cache(cfg, run, folder)
        rows, held_out = on_main(run, load_rows, cfg, multiple, cache.known_good())
        shown = on_main(run, read_shown, cfg, held_out.records)
        dataset, buckets, shape_ids = EncodedEdits(cfg, rows, cache), rows.buckets, rows.source_shapes()
        run.print(
            f"{len(rows.records)} rows to train on, {len(held_out.records)} held out; {describe_buckets(buckets)}"
        )
    group_size = cfg.train_batch_size * accumulation * run.world_size
    if cfg.num_train_epochs:
        cfg.max_train_steps = -(-cfg.num_train_epochs * len(dataset) // group_size)
    if cfg.validation_epochs and cfg.validation_steps:
        cfg.validation_steps = min(
            cfg.validation_steps, max(1, round(cfg.validation_epochs * len(dataset) / group_size))
        )
    sampler = MicroBatchSampler(
        buckets,
        cfg.train_batch_size,
        accumulation,
        run.rank,
        run.world_size,
        cfg.seed,
        state["segments"],
        state["step"],
        shape_ids,
    )
    if not cfg.benchmark:
        held_out_views = [held_out.view(cfg, row, 0, 0) for row in range(len(held_out.records))]
        parts = [(rows, rows.views(cfg, sampler)), (held_out, set(held_out_views))]
        encode(cfg, run, folder, cache, what_to_encode(cfg, cache, parts, shown))

    transformer = load_transformer(cfg, run, folder, transformer)
    transformer_config = json.loads(transformer.to_json_string())
    optimizer = build_optimizer(transformer, cfg, run.strategy, run.offload)
    model, optimizer = runtime.prepare(run, transformer, optimizer, cfg)
    models = Models(
        transformer=model,
        transformer_config=transformer_config,
        scheduler_config=scheduler_config,
        dtype=torch.bfloat16 if cfg.mixed_precision == "bf16" else torch.float32,
        trained_share=trained_share,
        ema=Ema(transformer, cfg.ema_decay) if cfg.ema_decay else None,
    )
    if not cfg.benchmark:
        models.data_digest = data_digest(rows.records, buckets)
    if cfg.validation_steps and not cfg.benchmark:
        models.vae = load_vae(folder, run.device, models.dtype)
        models.shown = [
            (edit, *(cache[edit.key(cache, empty)]["prompt_embeds"] for empty in (False, True))) for edit in shown
        ]
        models.held_out = [
            load_view(cache, record, view, empty=False)
            for record, view in zip(held_out.records, held_out_views, strict=True)
        ]

    step = state["step"]
    if resume:
        load_checkpoint(run, resume, model, optimizer, models.ema)
        run.print(f"resumed from {resume} at step {step}; settings changed since: {changed_settings(state, cfg)}")
        if state["data"] != models.data_digest:
            run.print("the data changed since that checkpoint: the order of samples is not a continuation of it")
    on_main(run, claim_output_dir, cfg.output_dir, resume, cfg.overwrite_output_dir)  # now deletes what was there
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
    if cfg.benchmark:
        print_benchmark(run, cfg)
    elif step < cfg.max_train_steps:
        run.print(f"stopped at step {step} as asked; go on with the same command and --resume_from_checkpoint latest")
    else:
        if cfg.export_model:
            export(run, cfg, models)
        print_next_steps(run, cfg)
    accelerator.end_training()  # ends the processes' group too: nothing collective may follow


def print_next_steps(run: Run, cfg: Config) -> None:
    run.print(
        f"\ndone. Look at\n  {cfg.output_dir}/validation_images/ (grid.png in each step's folder)\n"
        f"  {cfg.output_dir}/curves.png\n"
        f"edit with the result:\n  {sys.executable} {RECIPE / 'sample.py'} --run {cfg.output_dir} --image PICTURE "
        '--prompt "..."\n'
        f"train your own:\n  bash {RECIPE / 'run.sh'} full --train_data_dir /data/mine"
    )


if __name__ == "__main__":
    with explained_errors():
        main()
