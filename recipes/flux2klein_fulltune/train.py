"""Full-parameter fine-tuning of FLUX.2 Klein (Flux2Transformer2DModel, 9B or 4B), with or without reference images.
Read it top to bottom.

    bash run.sh                                           the tiny model and drawn data, on any machine
    bash run.sh full --train_data_dir /data/mine          the real model, on the machine that configs/full.yaml names

Order: Config, data, encode, load_models, compute_loss, validate, save and export, main with the loop.
"""

import contextlib
import dataclasses
import gc
import itertools
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

RECIPE = Path(__file__).resolve().parent
REPOSITORY = next(folder for folder in RECIPE.parents if (folder / "common").is_dir())
sys.path.insert(0, str(REPOSITORY))

import torch
from accelerate import init_empty_weights
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoTokenizer, Qwen3ForCausalLM

from common import flow_matching as fm
from common import runtime
from common.cache import CachedSamples, EmbeddingCache
from common.checkpoint import claim_output_dir, find_checkpoint, load_checkpoint, save_checkpoint
from common.config import changed_settings, parse_config, save_config
from common.data import (
    MicroBatchSampler,
    Place,
    data_digest,
    describe_buckets,
    make_buckets,
    make_loader,
    nearest_bucket,
)
from common.export import export_weights
from common.folders import folder_fingerprint, model_folder, read_prompts, resolve_paths
from common.images import check_image, decode_image, image_to_tensor, resize_and_crop
from common.limits import check_disk, check_memory, explained_errors
from common.manifest import Record, check_records, hold_out, load_image, load_manifest
from common.metrics import Meter, append_row, print_benchmark, save_grid, write_environment
from common.optimizers import build_optimizer
from common.runtime import Run, on_main
from common.sharding import Ema, load_weights, load_weights_zero3, random_reader, safetensors_reader
from common.steps import assert_ranks_agree, clip_gradients, lr_factor, seed_step, set_learning_rate

PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
VALIDATION_SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)
ACTIVATIONS_GIB = 2.4  # of one 1024 x 1024 sample with checkpointing on an H100: 19.3 in use beside 16.9 of weights
FULL_SIZE = {  # black-forest-labs/FLUX.2-klein-base-9B; the benchmark builds it with random weights
    "num_layers": 8,
    "num_single_layers": 24,
    "num_attention_heads": 32,
    "joint_attention_dim": 12288,
    "guidance_embeds": False,
}
REFERENCE_PIXELS = 1024**2  # the pipeline shrinks larger reference images to this area


@dataclass
class Config:
    """Every setting of the recipe. `configs/*.yaml` sets them, flags on the command line override."""

    pretrained_model_name_or_path: str = "black-forest-labs/FLUX.2-klein-base-9B"
    """local folder or a hub name; "tiny" is the embedded model that make_tiny.py builds"""
    transformer_path: str | None = None
    """another folder of transformer weights to start from, for example export/transformer of an earlier run"""
    allow_distilled: bool = False
    """train a step-distilled checkpoint all the same (it loses its few-step sampling; take the base model instead)"""
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
    launch: str = "single"
    """launch file in accelerate/ that run.sh uses; LAUNCH=... overrides it"""

    resolution: int = 1024
    """target area is resolution squared, in aspect-ratio buckets with sides that are multiples of 32"""
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
    logit_mean: float = 0.0
    """mean of logit_normal"""
    logit_std: float = 1.0
    """standard deviation of logit_normal"""
    mode_scale: float = 1.29
    """scale of mode sampling"""
    timestep_shift: float = 0.0
    """fixed shift of sigma towards noise; 0 takes the checkpoint's, which grows with resolution"""
    shift_rule: Literal["flux1", "empirical"] = "flux1"
    """what the checkpoint's shift is: flux1, linear from 0.5 at 256 tokens to 1.15 at 4096; empirical, the larger one
    that the pipeline samples with, at num_inference_steps"""
    loss_weighting: Literal["none", "sigma_sqrt", "cosmap"] = "none"
    """weight of the squared error by sigma"""
    caption_dropout: float = 0.1
    """share of samples trained with the encoded empty caption, for classifier-free guidance"""
    max_sequence_length: int = 512
    """prompt tokens kept, as the pipeline's default"""
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
    benchmark_prompt_tokens: int = 512
    """prompt length of the benchmark"""

    def __post_init__(self) -> None:
        if self.resolution % 32 or self.resolution <= 0:
            nearest = max(32, round(self.resolution / 32) * 32)
            raise ValueError(
                f"resolution must be a positive multiple of 32 (VAE 8 x packing 2, twice), got {self.resolution}; "
                f"use {nearest}"
            )
        if not self.benchmark and self.train_data_dir is None:
            raise ValueError(
                "train_data_dir is not set; pass --train_data_dir FOLDER "
                "(or run the tiny config, which brings its own)"
            )
        for name in ("train_batch_size", "gradient_accumulation_steps", "max_train_steps"):
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


class RandomSamples(Dataset):
    """Random latents and prompt embeddings of the benchmark's size, in place of encoded data."""

    def __init__(self, cfg: Config, prompt_width: int):
        self.side, self.tokens, self.width = cfg.resolution // 16, cfg.benchmark_prompt_tokens, prompt_width

    def __len__(self) -> int:
        return 64

    def __getitem__(self, place: Place) -> dict:
        rng = torch.Generator().manual_seed(place.sample)
        latents = torch.randn(128, self.side, self.side, generator=rng)
        prompt_embeds = torch.randn(self.tokens, self.width, generator=rng, dtype=torch.bfloat16)
        return {"latents": latents, "prompt_embeds": prompt_embeds, "step": place.step, "position": place.position}


def collate(samples: list[dict]) -> dict:
    """One micro-batch: latents (B, 128, H/16, W/16), prompt_embeds (B, L, D), references one (B, 128, h, w) for each
    place in the prompt, and each sample's place in the step."""
    names = [name for name in samples[0] if name not in ("step", "position")]
    batch = {name: torch.stack([sample[name] for sample in samples]) for name in names}
    return {**batch, "step": samples[0]["step"], "positions": [sample["position"] for sample in samples]}


def load_records(cfg: Config, known_good: set[str]) -> tuple[list[Record], list[Record]]:
    """Checked rows: those to train on, and those held out for the validation loss."""
    records = load_manifest(cfg.train_data_dir, cfg.train_data_meta)
    records = check_records(
        records, cfg.train_data_dir, cfg.on_bad_rows, cfg.output_dir, known_good, source_problem=reference_problem
    )
    return hold_out(records, cfg.num_validation_samples, cfg.seed)


def reference_shapes(records: list[Record]) -> list[tuple] | None:
    """The sizes of each row's references: what the rows of one micro-batch must share, because the transformer takes
    one set of positions a batch. None where no row has any."""
    shapes = [tuple(reference_size(*size) for size in record.source_sizes) for record in records]
    return shapes if any(shapes) else None


def read_validation_prompts(cfg: Config, held_out: list[Record]) -> tuple[list[str], list[list[Image.Image]]]:
    """The validation prompts and the reference images of each, as settings name them, or of four held-out rows.

    ValueError when there are not as many entries as prompts, or for an image that cannot be used.
    """
    prompts = read_prompts(cfg.validation_prompts)
    if not prompts:
        shown = held_out[:4]
        sources = [
            [load_image(record, cfg.train_data_dir, which=index) for index in range(len(record.source_file_path))]
            for record in shown
        ]
        return [record.text for record in shown], sources
    if not cfg.validation_image_paths:
        return prompts, [[] for _ in prompts]
    if len(cfg.validation_image_paths) != len(prompts):
        raise ValueError(
            f"validation_image_paths has {len(cfg.validation_image_paths)} entries, expected one for each of the "
            f"{len(prompts)} validation prompts (several images of one prompt joined by commas, '' for none)"
        )
    images = [[Path(path) for path in paths.split(",") if path] for paths in cfg.validation_image_paths]
    for path in itertools.chain(*images):
        if not path.is_file():
            raise ValueError(f"validation_image_paths names {path}, which is not there; give paths of pictures")
        try:
            problem = reference_problem(*check_image(path.read_bytes(), decode=True, max_pixels=2**31))
        except ValueError as error:
            problem = f"cannot be used: {error}"
        if problem:
            raise ValueError(f"validation_image_paths: {path} {problem}")
    return prompts, [[decode_image(path.read_bytes()) for path in paths] for paths in images]


def reference_problem(width: int, height: int) -> str:
    """What the pipeline would refuse a reference image of this size for; "" if nothing."""
    if min(width, height) >= 64 and max(width, height) <= 8 * min(width, height):
        return ""
    return (
        f"is {width} x {height}; the pipeline takes sides of at least 64 pixels and an aspect of at most 8 : 1; "
        "crop or enlarge it"
    )


def reference_size(width: int, height: int) -> tuple[int, int]:
    """(width, height) at which the pipeline encodes a reference: at most REFERENCE_PIXELS, sides cut to 16s."""
    if width * height > REFERENCE_PIXELS:
        scale = math.sqrt(REFERENCE_PIXELS / (width * height))
        width, height = int(width * scale), int(height * scale)
    return width // 16 * 16, height // 16 * 16


# ---------------------------------------------------------------- encoding


class Encoders:
    """The frozen VAE and text encoder, loaded plainly (never sharded), used before training and then dropped."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype):
        self.device = device
        self.vae = load_vae(folder, device, torch.float32)
        text_encoder = Qwen3ForCausalLM.from_pretrained(folder / "text_encoder", dtype=dtype).to(device).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        self.pipeline = Flux2KleinPipeline(
            scheduler=None, vae=self.vae, text_encoder=text_encoder, tokenizer=tokenizer, transformer=None
        )

    @torch.no_grad()
    def prompt(self, text: str, max_sequence_length: int) -> dict[str, Tensor]:
        """prompt_embeds (L, D): three layers' hidden states side by side, of the text in the pipeline's own chat
        template. L is always max_sequence_length: the transformer sees the padding, it has no mask."""
        prompt_embeds, _ = self.pipeline.encode_prompt(
            [text], device=self.device, max_sequence_length=max_sequence_length
        )
        return {"prompt_embeds": prompt_embeds[0].cpu()}

    @torch.no_grad()
    def image(self, pixels: Tensor, moments: bool) -> dict[str, Tensor]:
        """pixels (3, H, W) in [-1, 1] -> latents (128, H/16, W/16), 2 x 2 patches normalised per channel; with moments
        also the posterior's std."""
        posterior = self.vae.encode(pixels[None].to(self.device)).latent_dist  # of (1, 32, H/8, W/8)
        mean, std = latent_statistics(self.vae)
        encoded = {"latents": ((patchify(posterior.mode()) - mean) / std)[0].cpu()}
        return encoded | ({"posterior_std": (patchify(posterior.std) / std)[0].cpu()} if moments else {})

    def reference(self, image: Image.Image) -> Tensor:
        """(128, h, w) latents of a reference image, resized and cut by the pipeline's own processor."""
        processor = self.pipeline.image_processor
        width, height = reference_size(*image.size)
        if image.width * image.height > REFERENCE_PIXELS:
            image = processor._resize_to_target_area(image, REFERENCE_PIXELS)
        pixels = processor.preprocess(image, height=height, width=width, resize_mode="crop")  # (1, 3, H, W)
        return self.image(pixels[0], moments=False)["latents"]


def load_vae(folder: Path, device: torch.device, dtype: torch.dtype) -> AutoencoderKLFlux2:
    """In eval mode: its batch norm's running statistics normalise the latents and must not follow a batch."""
    return AutoencoderKLFlux2.from_pretrained(folder / "vae", dtype=dtype).to(device).eval().requires_grad_(False)


def patchify(latents: Tensor) -> Tensor:
    """(B, 32, H, W) -> (B, 128, H/2, W/2): each 2 x 2 square becomes channels, the original channel first."""
    batch_size, channels, height, width = latents.shape
    squares = latents.reshape(batch_size, channels, height // 2, 2, width // 2, 2)
    return squares.permute(0, 1, 3, 5, 2, 4).reshape(batch_size, channels * 4, height // 2, width // 2)


def latent_statistics(vae: AutoencoderKLFlux2) -> tuple[Tensor, Tensor]:
    """(latents_mean, latents_std), each (1, 128, 1, 1): normalised latents are (latents - mean) / std."""
    std = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
    return vae.bn.running_mean.view(1, -1, 1, 1), std.view(1, -1, 1, 1)


def open_cache(cfg: Config, run: Run, folder: Path) -> EmbeddingCache:
    """The embedding cache, with everything but the row that encoded tensors depend on."""
    fingerprint = {
        "model": on_main(
            run, lambda: {part: folder_fingerprint(folder / part) for part in ("vae", "text_encoder", "tokenizer")}
        ),
        "max_sequence_length": cfg.max_sequence_length,
        "reference_pixels": REFERENCE_PIXELS,
        "latents": "moments" if cfg.cache_moments else "mode",
        "precision": cfg.mixed_precision,
    }
    return EmbeddingCache(cfg.cache_dir or Path(cfg.output_dir) / "embedding_cache", fingerprint, run.rank)


def encode(
    cfg: Config,
    run: Run,
    folder: Path,
    cache: EmbeddingCache,
    items: dict[str, tuple[Record | str, tuple[int, int] | None]],
) -> None:
    """Encode what the cache lacks of {key: (record, (width, height)) or (prompt, None)}, each process its share;
    encoders leave memory."""
    missing = on_main(run, cache.missing, list(items))
    if missing:
        encoders = Encoders(folder, run.device, torch.bfloat16 if cfg.mixed_precision == "bf16" else torch.float32)
        for key in run.progress(missing[run.rank :: run.world_size], "encode"):
            item, bucket = items[key]
            text = item if isinstance(item, str) else item.text
            tensors = encoders.prompt(text, cfg.max_sequence_length)
            if bucket:
                image = load_image(item, cfg.train_data_dir, at_least=bucket)
                tensors |= encoders.image(image_to_tensor(resize_and_crop(image, bucket)), cfg.cache_moments)
                for index in range(len(item.source_file_path)):
                    image = load_image(item, cfg.train_data_dir, which=index)
                    tensors[f"reference_{index}"] = encoders.reference(image)
            cache.add(key, tensors)
        del encoders
        gc.collect()
        torch.cuda.empty_cache()
    cache.flush()
    run.barrier()
    cache.reload()


# ---------------------------------------------------------------- models


@dataclass
class Models:
    """What compute_loss, validate, save and export need."""

    transformer: torch.nn.Module  # as the strategy wraps it; call this one
    transformer_config: dict
    scheduler_config: dict
    empty_prompt_embeds: Tensor  # (L, D) of "", for caption dropout and guidance
    dtype: torch.dtype  # what the transformer computes in
    schedule: None = None  # the learning rate is a function of the step: no state to keep
    data_digest: str = ""  # of rows and buckets, to notice on resume that the data changed
    ema: Ema | None = None
    vae: AutoencoderKLFlux2 | None = None
    validation_prompts: list[tuple[str, Tensor]] = dataclasses.field(default_factory=list)  # (text, (L, D))
    validation_images: list[list[Image.Image]] = dataclasses.field(default_factory=list)  # references of each prompt
    held_out: list[dict] = dataclasses.field(default_factory=list)  # encoded rows


def refuse_distilled(cfg: Config, folder: Path) -> None:
    """ValueError for a step-distilled checkpoint: flow matching on data would undo its distillation."""
    index = folder / "model_index.json"
    if not cfg.allow_distilled and index.is_file() and json.loads(index.read_text()).get("is_distilled"):
        raise ValueError(
            f"{cfg.pretrained_model_name_or_path} is step-distilled: trained on data it loses its few-step sampling; "
            "take the base model (black-forest-labs/FLUX.2-klein-base-9B or -4B), or insist with --allow_distilled"
        )


def weights_folder(cfg: Config, folder: Path | None) -> Path | None:
    """Where the weights to start from are; None for the benchmark's random ones."""
    return Path(cfg.transformer_path) if cfg.transformer_path else folder and folder / "transformer"


def empty_transformer(cfg: Config, run: Run, folder: Path | None) -> Flux2Transformer2DModel:
    """The model to train, without memory for its weights. Called before the data is encoded: what is not there or does
    not fit is said at once."""
    weights = weights_folder(cfg, folder)
    if weights and not (weights / "config.json").is_file():
        raise ValueError(f"transformer_path {weights} has no config.json; give a run's export/transformer, say")
    with init_empty_weights():
        transformer = Flux2Transformer2DModel.from_config(
            Flux2Transformer2DModel.load_config(weights) if weights else FULL_SIZE
        )
    parameters = sum(p.numel() for p in transformer.parameters())
    check_memory(run, cfg, parameters, ACTIVATIONS_GIB)
    check_disk(run, cfg, parameters)
    return transformer


def load_transformer(
    cfg: Config, run: Run, folder: Path | None, transformer: Flux2Transformer2DModel
) -> Flux2Transformer2DModel:
    """Fill the model in the strategy's weight dtype, shard by shard; random weights for the benchmark."""
    weights, dtype = weights_folder(cfg, folder), runtime.weights_dtype(cfg, run.strategy.startswith("zero"))
    if cfg.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if cfg.compile:
        torch._dynamo.config.recompile_limit = 64  # training and validation, and sizes: each is a variant
        transformer.compile_repeated_blocks()
    transformer = runtime.shard(run, transformer, dtype, cfg).train()
    device = torch.device("cpu") if run.offload else run.device
    read = safetensors_reader(weights, set(transformer.state_dict())) if weights else random_reader(cfg.seed, device)
    if run.strategy == "zero3":
        load_weights_zero3(
            transformer, read, dtype, run.device, run.accelerator.state.deepspeed_plugin.deepspeed_config
        )
    else:
        load_weights(transformer, read, dtype, device)
    return transformer


def forward_flops(config: dict, image_tokens: int, prompt_tokens: int) -> float:
    """FLOPs of one sample's forward (matrix products and attention, 2 a multiply-add); 75.5e12 at 1024 x 1024 with 512
    prompt tokens. References count as image tokens."""
    width = config["num_attention_heads"] * config["attention_head_dim"]
    blocks = config["num_layers"] + config["num_single_layers"]
    tokens = image_tokens + prompt_tokens
    block = (8 + 6 * config["mlp_ratio"]) * tokens * width**2 + 4 * tokens**2 * width
    edges = 2 * width * (2 * config["in_channels"] * image_tokens + config["joint_attention_dim"] * prompt_tokens)
    modulation = 2 * width**2 * (2 * 6 + 3 + 2 + 1)
    return blocks * block + edges + modulation


# ---------------------------------------------------------------- loss


def pack_latents(latents: Tensor) -> Tensor:
    """(B, 128, H, W) -> (B, H * W, 128): a token is one place."""
    return latents.flatten(2).transpose(1, 2)


def image_ids(latents: list[Tensor], device: torch.device) -> Tensor:
    """(1, S, 4) positions (T, H, W, L) of the target's tokens (T = 0), then of each reference's (T = 10, 20, ...)."""
    ids = [
        torch.cartesian_prod(
            torch.tensor([10 * index]), torch.arange(each.shape[-2]), torch.arange(each.shape[-1]), torch.arange(1)
        )
        for index, each in enumerate(latents)
    ]
    return torch.cat(ids)[None].to(device)


def text_ids(prompt_embeds: Tensor) -> Tensor:
    """(1, L, 4) positions (0, 0, 0, l) of the prompt's tokens."""
    length = torch.arange(prompt_embeds.shape[1])
    return torch.cartesian_prod(*[torch.arange(1)] * 3, length)[None].to(prompt_embeds.device)


def predict_velocity(
    models: Models, noisy_latents: Tensor, sigma: Tensor, prompt_embeds: Tensor, references: list[Tensor]
) -> Tensor:
    """Call the transformer as the pipeline does: noisy_latents (B, 128, H, W), sigma (B,), prompt_embeds (B, L, D),
    references [(B, 128, h, w), ...] -> packed velocity_pred (B, S, 128) of the target's tokens alone."""
    batch_size, device = len(noisy_latents), noisy_latents.device
    images = [noisy_latents, *(reference.to(device) for reference in references)]
    packed_latents = torch.cat([pack_latents(each) for each in images], dim=1)  # (B, S + references, 128)
    prompt_embeds = prompt_embeds.to(device, models.dtype)
    velocity_pred = models.transformer(
        hidden_states=packed_latents.to(models.dtype),
        timestep=(sigma * 1000).to(models.dtype) / 1000,  # (B,), rounded as the pipeline rounds its timesteps
        guidance=None,
        encoder_hidden_states=prompt_embeds,  # (B, L, D)
        txt_ids=text_ids(prompt_embeds).expand(batch_size, -1, -1),  # (B, L, 4)
        img_ids=image_ids(images, device).expand(batch_size, -1, -1),  # (B, S + references, 4)
        joint_attention_kwargs=None,
        return_dict=False,
    )[0]
    return velocity_pred[:, : noisy_latents.shape[-2] * noisy_latents.shape[-1]]


def references_of(batch: dict) -> list[Tensor]:
    """The reference latents of a micro-batch or of an encoded row, in the manifest's order."""
    return [batch[f"reference_{index}"] for index in range(sum(name.startswith("reference_") for name in batch))]


def sigma_shift(cfg: Config, scheduler_config: dict, image_tokens: int) -> float:
    """How far sigma moves towards noise for a picture of so many tokens (references do not count)."""
    if cfg.timestep_shift:
        return cfg.timestep_shift
    if cfg.shift_rule == "empirical":
        return math.exp(compute_empirical_mu(image_tokens, cfg.num_inference_steps))
    return math.exp(fm.resolution_shift(image_tokens, scheduler_config))


def compute_loss(models: Models, batch: dict, cfg: Config) -> tuple[Tensor, dict]:
    """One micro-batch's loss, and what the meter adds up.

    Noise, sigma and dropout depend on (seed, step, position) alone.
    """
    device = models.empty_prompt_embeds.device
    rngs = fm.sample_rngs(cfg.seed, batch["step"], batch["positions"])
    uniform, dropout = fm.draw_uniform(rngs), fm.draw_uniform(rngs)  # (B,), (B,)
    latents = batch["latents"].to(device)  # (B, 128, H/16, W/16) float32
    noise = fm.draw_normal(rngs, latents.shape[1:]).to(device)  # (B, 128, H/16, W/16)
    if "posterior_std" in batch:
        latents = latents + batch["posterior_std"].to(device) * fm.draw_normal(rngs, latents.shape[1:]).to(device)
    dropped = (dropout < cfg.caption_dropout).to(device)[:, None, None]
    prompt_embeds = torch.where(dropped, models.empty_prompt_embeds, batch["prompt_embeds"].to(device))  # (B, L, D)
    references = references_of(batch)

    target_tokens = latents.shape[-2] * latents.shape[-1]
    sigma = fm.sample_sigmas(uniform, cfg.timestep_sampling, cfg.logit_mean, cfg.logit_std, cfg.mode_scale)
    sigma = fm.shift_sigmas(sigma, sigma_shift(cfg, models.scheduler_config, target_tokens)).to(device)  # (B,)

    noisy_latents = fm.add_noise(latents, noise, sigma)
    velocity_pred = predict_velocity(models, noisy_latents, sigma, prompt_embeds, references)  # (B, S, 128)
    target = pack_latents(fm.velocity_target(latents, noise))  # (B, S, 128)
    loss = fm.flow_matching_loss(velocity_pred, target, fm.loss_weights(sigma, cfg.loss_weighting))
    image_tokens = target_tokens + sum(each.shape[-2] * each.shape[-1] for each in references)
    flops = len(latents) * forward_flops(models.transformer_config, image_tokens, prompt_embeds.shape[1])
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
        latents = row["latents"][None].to(run.device)  # (1, 128, H/16, W/16)
        references = [reference[None] for reference in references_of(row)]
        noise = fm.draw_normal(fm.sample_rngs(cfg.seed, 0, [index]), latents.shape[1:]).to(run.device)
        for value in VALIDATION_SIGMAS:
            sigma = torch.full((1,), value, device=run.device)
            noisy_latents = fm.add_noise(latents, noise, sigma)
            velocity_pred = predict_velocity(models, noisy_latents, sigma, row["prompt_embeds"][None], references)
            error = (velocity_pred.float() - pack_latents(fm.velocity_target(latents, noise))).pow(2).mean()
            if index < len(models.held_out):  # ranks past the end only keep step
                total += torch.stack([error.double(), torch.ones_like(error).double()])
    if run.world_size > 1:
        torch.distributed.all_reduce(total)
    return (total[0] / total[1]).item()


def draw_validation_images(run: Run, cfg: Config, models: Models, folder: Path) -> None:
    """Process r draws prompts r, r + world size, ...; the main process then joins them into grid.png."""
    folder.mkdir(parents=True, exist_ok=True)
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(models.scheduler_config)
    transformer = run.unwrap(models.transformer)
    pipeline = Flux2KleinPipeline(
        scheduler=scheduler, vae=models.vae, text_encoder=None, tokenizer=None, transformer=transformer
    )
    pipeline.set_progress_bar_config(disable=True)
    prompts = models.validation_prompts
    empty = models.empty_prompt_embeds[None].to(run.device, models.dtype)  # (1, L, D)

    def in_vae_dtype(pipeline: Flux2KleinPipeline, step: int, timestep: Tensor, tensors: dict) -> dict:
        """Autocast (fp32 weights, bf16 compute) returns float32, and this pipeline decodes without a cast."""
        return {"latents": tensors["latents"].to(models.dtype)}

    for start in range(0, len(prompts), run.world_size):
        index = (start + run.rank) % len(prompts)
        text, prompt_embeds = prompts[index]
        sources = models.validation_images[index]
        image = pipeline(
            image=sources or None,
            prompt_embeds=prompt_embeds[None].to(run.device, models.dtype),  # (1, L, D)
            negative_prompt_embeds=empty,
            guidance_scale=cfg.guidance_scale,
            width=cfg.resolution,
            height=cfg.resolution,
            num_inference_steps=cfg.num_inference_steps,
            generator=torch.Generator().manual_seed(cfg.seed + index),
            callback_on_step_end=in_vae_dtype,
        ).images[0]
        if start + run.rank < len(prompts):
            image.save(folder / f"{index:03d}.png")
            for number, source in enumerate(sources):
                source.resize(reference_size(*source.size)).save(folder / f"{index:03d}_source_{number}.png")
            (folder / f"{index:03d}.txt").write_text(text + "\n")
    run.barrier()
    if run.is_main and prompts:
        save_grid(folder, [text for text, _ in prompts])


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
    """export/transformer: bf16 safetensors (averaged weights where they are kept) that
    Flux2Transformer2DModel.from_pretrained reads."""
    files = {"config.json": json.dumps(models.transformer_config, indent=2)}
    with models.ema.applied() if models.ema else contextlib.nullcontext():
        export_weights(run, models.transformer, Path(cfg.output_dir) / "export" / "transformer", files)


# ---------------------------------------------------------------- main


def main(argv: list[str] | None = None) -> None:
    cfg = parse_config(Config, argv)
    resolve_paths(cfg, RECIPE, argv)
    run = runtime.set_up(cfg, RECIPE)
    accelerator, accumulation = run.accelerator, cfg.gradient_accumulation_steps
    resume = on_main(run, find_checkpoint, cfg.output_dir, cfg.resume_from_checkpoint)
    on_main(run, claim_output_dir, cfg.output_dir, resume, cfg.overwrite_output_dir, False)

    if cfg.benchmark:
        folder, scheduler_config = (
            None,
            {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15},
        )
    else:
        folder = on_main(run, model_folder, cfg.pretrained_model_name_or_path, PARTS)
        refuse_distilled(cfg, folder)
    transformer = empty_transformer(cfg, run, folder)
    if not cfg.benchmark:
        scheduler_config = FlowMatchEulerDiscreteScheduler.load_config(folder / "scheduler")
        cache = open_cache(cfg, run, folder)
        records, held_out = on_main(run, load_records, cfg, cache.known_good())
        prompts, validation_images = read_validation_prompts(cfg, held_out)
        prompts = ["", *prompts]
        sizes = make_buckets(cfg.resolution)
        rows = records + held_out
        buckets = [nearest_bucket(record.width, record.height, sizes) for record in rows]  # (width, height)
        items = [*zip(rows, buckets, strict=True), *((prompt, None) for prompt in prompts)]
        keys = [cache.key(record, bucket) for record, bucket in zip(rows, buckets, strict=True)]
        prompt_keys = [cache.key(prompt) for prompt in prompts]
        encode(cfg, run, folder, cache, dict(zip(keys + prompt_keys, items, strict=True)))
        run.print(f"{len(records)} rows to train on, {len(held_out)} held out; {describe_buckets(buckets)}")

    transformer = load_transformer(cfg, run, folder, transformer)
    transformer_config = json.loads(transformer.to_json_string())
    if cfg.benchmark:
        dataset = RandomSamples(cfg, transformer_config["joint_attention_dim"])
        bucket_ids, shape_ids = [0] * len(dataset), None
        empty_prompt_embeds = torch.randn(cfg.benchmark_prompt_tokens, transformer_config["joint_attention_dim"])
        empty_prompt_embeds = empty_prompt_embeds.bfloat16()
    else:
        dataset = CachedSamples(cache, keys[: len(records)])
        bucket_ids, shape_ids = buckets[: len(records)], reference_shapes(records)
        empty_prompt_embeds = cache[prompt_keys[0]]["prompt_embeds"]
    if cfg.num_train_epochs:
        cfg.max_train_steps = -(
            -cfg.num_train_epochs * len(dataset) // (cfg.train_batch_size * accumulation * run.world_size)
        )

    optimizer = build_optimizer(transformer, cfg, run.strategy, run.offload)
    model, optimizer = runtime.prepare(run, transformer, optimizer, cfg)
    models = Models(
        transformer=model,
        transformer_config=transformer_config,
        scheduler_config=scheduler_config,
        empty_prompt_embeds=empty_prompt_embeds.to(run.device),
        dtype=torch.bfloat16 if cfg.mixed_precision == "bf16" else torch.float32,
        ema=Ema(transformer, cfg.ema_decay) if cfg.ema_decay else None,
    )
    if not cfg.benchmark:
        models.data_digest = data_digest(records, bucket_ids)
    if cfg.validation_steps and not cfg.benchmark:
        models.vae = load_vae(folder, run.device, models.dtype)
        models.validation_prompts = [
            (text, cache[key]["prompt_embeds"]) for text, key in zip(prompts[1:], prompt_keys[1:], strict=True)
        ]
        models.validation_images = validation_images
        models.held_out = [cache[key] for key in keys[len(records) :]]

    step, segments = 0, []
    if resume:
        state = load_checkpoint(run, resume, model, optimizer, models.ema)
        step, segments = state["step"], state["segments"]
        run.print(f"resumed from {resume} at step {step}; settings changed since: {changed_settings(state, cfg)}")
        if state["data"] != models.data_digest:
            run.print("the data changed since that checkpoint: the order of samples is not a continuation of it")
    sampler = MicroBatchSampler(
        bucket_ids, cfg.train_batch_size, accumulation, run.rank, run.world_size, cfg.seed, segments, step, shape_ids
    )
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
        f'draw from the result:\n  {sys.executable} {RECIPE / "sample.py"} --run {cfg.output_dir} --prompt "..."\n'
        f"train your own:\n  bash {RECIPE / 'run.sh'} full --train_data_dir /data/mine"
    )


if __name__ == "__main__":
    with explained_errors():
        main()
