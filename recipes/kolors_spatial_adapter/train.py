"""A spatial adapter for Kolors: boxes with phrases say what stands where. The UNet stays frozen; about 50 million
parameters at its cross-attentions train. Read it top to bottom.

    bash run.sh                                           the tiny model and drawn data, on any machine
    bash run.sh full --train_data_dir /data/mine          the real model, on the machine that configs/full.yaml names

Order: Config, encode, load_models, compute_loss, validate, save and export, main with the loop. The adapter is in
adapter.py, the three modes and their losses in modes.py, rows with boxes in layouts.py and boxes.py.
"""

import dataclasses
import gc
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal

RECIPE = Path(__file__).resolve().parent
REPOSITORY = next(folder for folder in RECIPE.parents if (folder / "common").is_dir())
sys.path[:0] = [str(RECIPE), str(REPOSITORY)]

import diffusers
import torch
from accelerate import init_empty_weights
from adapter import (
    SpatialAdapter,
    draw_embedded,
    embed_phrase,
    gate_values,
    load_adapter,
    new_adapter,
    save_adapter,
)
from boxes import flip_boxes, largest_first, show_boxes
from diffusers import AutoencoderKL, KolorsPipeline, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.pipelines.kolors import ChatGLMModel, ChatGLMTokenizer
from graphs import UNetGraphs
from layouts import (
    LayoutRow,
    LayoutSamples,
    RandomLayouts,
    build_vocabulary,
    collate,
    index_phrases,
    objects_in_bucket,
    read_layouts,
    size_conditions,
    with_problems,
)
from modes import IMAGE_FEATURES, MODES, REGION_FEATURES, SpatialModel, predict_noise, unet_features
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from common import flow_matching as fm
from common import runtime
from common.cache import EmbeddingCache
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
from common.folders import folder_fingerprint, model_folder, resolve_paths
from common.images import image_to_tensor, resize_and_crop
from common.limits import check_disk, explained_errors
from common.manifest import Record, check_records, hold_out, load_image, load_manifest
from common.metrics import Meter, append_row, print_benchmark, save_grid, write_environment
from common.optimizers import build_optimizer
from common.runtime import Run, on_main
from common.sharding import load_weights, random_reader, safetensors_reader
from common.steps import assert_ranks_agree, clip_gradients, lr_factor, seed_step, set_learning_rate

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}
VALIDATION_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)  # shares of the training timesteps
PROMPT_TOKENS = 256  # the pipeline pads to them, and the UNet reads the padding
MEMORY_ADVICE = (
    "In this order, try: --gradient_checkpointing; --train_batch_size 1 with accumulation; a smaller --resolution; "
    "--modes generation does not help (a mode's memory is free before the next begins); --optimizer adamw_8bit; "
    "LAUNCH=zero2 (optimizer state in RAM)"
)
FULL_SIZE = {  # Kwai-Kolors/Kolors-diffusers; the benchmark builds it with random weights
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "encoder_hid_dim": 4096,
    "encoder_hid_dim_type": "text_proj",
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 5632,
    "use_linear_projection": True,
}
FULL_SIZE_SCHEDULER = {
    "_class_name": "EulerDiscreteScheduler",
    "num_train_timesteps": 1100,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.014,
}


@dataclass
class Config:
    """Every setting of the recipe. `configs/*.yaml` sets them, flags on the command line override."""

    pretrained_model_name_or_path: str = "Kwai-Kolors/Kolors-diffusers"
    """local folder or a hub name; "tiny" is the embedded model that make_tiny.py builds"""
    adapter_path: str | None = None
    """folder of an adapter to start from, for example export/adapter of an earlier run (its shape is then its own)"""
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
    random_flip: bool = False
    """mirror half of the samples, boxes with them; captions stay, so not for data that says left or right"""
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
    cuda_graphs: bool = False
    """record the UNet's kernels once for each mode and size of pictures, and launch them together: at batch 1 a GPU
    otherwise waits for launches most of the time; no effect without a GPU"""
    mixed_precision: Literal["bf16", "fp16", "no"] = "bf16"
    """compute in bf16, or in fp16 with a loss scale (adapters on cards without bf16); "no" is float32 throughout"""
    max_train_steps: int = 1000
    """optimizer steps"""
    num_train_epochs: int = 0
    """when given, sets max_train_steps to this many passes over the data, unless the command line gives both"""
    dataloader_num_workers: int = 2
    """processes that prepare batches ahead"""

    modes: str = "generation"
    """losses, joined by commas, each with a forward and a backward of its own for every micro-batch: generation alone,
    or captioning,retrieval,generation"""
    captioning_weight: float = 0.01
    """factor of the captioning loss, which is many times the generation loss and would drown it at 1"""
    retrieval_weight: float = 0.01
    """factor of the retrieval loss, likewise"""
    retrieval_queue: int = 1024
    """earlier layouts and pictures that retrieval keeps as negatives"""
    feature_time: float = 0.1
    """noise level at which captioning and retrieval look at a picture, as a share of the training timesteps"""
    injection: Literal["cross_attention", "gated_self_attention"] = "cross_attention"
    """what attends where: the picture to the grounding tokens, or (as in GLIGEN) to itself and the grounding tokens"""
    adapter_rank: int = 160
    """width of the adapter's attention in each layer, a multiple of 32; 160 gives about 50 million parameters"""
    query_positions: bool = True
    """tell the adapter's queries where in the picture they are"""
    box_bias: bool = True
    """let pixels inside a box attend to its token from the start, by a learned number for each layer and head"""
    max_objects: int = 16
    """boxes of a picture at most, the largest first"""
    grounding_dropout: float = 0.1
    """share of samples trained without boxes, for guidance"""
    snr_power: float = 0.0
    """weight of a sample's error: its signal-to-noise ratio to the minus this, so that noisy pictures, in which the
    layout is decided, count more; 0 is plain, 0.5 half of it in logarithms, 1 the error of the picture"""
    box_loss_weight: float = 1.0
    """how much more the error inside boxes counts than outside; 1 is plain"""
    caption_dropout: float = 0.1
    """share of samples trained with the encoded empty caption, for classifier-free guidance"""

    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "flash_adamw", "adafactor"] = "adamw"
    """see common/optimizers.py for memory and where each may run"""
    learning_rate: float = 1e-4
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

    checkpointing_steps: int = 500
    """steps between checkpoints, and one at the end; 0 saves none"""
    checkpoints_total_limit: int = 2
    """newest checkpoints kept; 0 keeps all"""
    resume_from_checkpoint: str | None = None
    """a checkpoint folder, or "latest" """
    validation_steps: int = 100
    """steps between validations, and one before the first step and at the end; 0 does none"""
    validation_layouts: str | None = None
    """JSONL file of rows {text, objects} to draw; four held-out rows when not given"""
    num_validation_samples: int = 8
    """rows held out of training for the validation loss (at most a tenth of the data)"""
    num_inference_steps: int = 30
    """sampling steps of validation pictures"""
    guidance_scale: float = 5.0
    """classifier-free guidance of validation pictures"""
    tau: float = 1.0
    """share of the sampling steps, the first ones, in which the adapter acts in validation pictures"""
    logging_steps: int = 1
    """steps between rows of metrics.jsonl"""
    report_to: Literal["none", "wandb", "tensorboard"] = "none"
    """tracker; wandb is offline when not logged in; metrics.jsonl and curves.png are always written"""
    tracker_project_name: str = ""
    """project name at the tracker; the recipe folder's name when empty"""
    benchmark: bool = False
    """random weights and inputs of the full size: print throughput, MFU and memory, and stop"""

    # what common/ asks every recipe for and this one does not have
    gradient_release, ema_decay, export_model = False, 0.0, True

    def __post_init__(self) -> None:
        if self.resolution % 32 or self.resolution <= 0:
            nearest = max(32, round(self.resolution / 32) * 32)
            raise ValueError(
                f"resolution must be a positive multiple of 32 (VAE 8 x UNet 4), got {self.resolution}; use {nearest}"
            )
        if not self.benchmark and self.train_data_dir is None:
            raise ValueError(
                "train_data_dir is not set; pass --train_data_dir FOLDER, with rows as label_layouts.py writes them "
                "(or run the tiny config, which brings its own)"
            )
        for name in (
            "train_batch_size",
            "gradient_accumulation_steps",
            "max_train_steps",
            "max_objects",
            "retrieval_queue",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("caption_dropout", "grounding_dropout", "tau", "feature_time"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share between 0 and 1, got {getattr(self, name)}")
        if self.optimizer not in ("adamw", "adamw_8bit", "paged_adamw_8bit"):
            raise ValueError(
                f"optimizer {self.optimizer} is for full tuning; the adapter is small: use adamw or adamw_8bit"
            )
        if self.adapter_rank < 32 or self.adapter_rank % 32:
            raise ValueError(f"adapter_rank must be a positive multiple of 32, got {self.adapter_rank}; use 160, say")
        if self.box_loss_weight <= 0:
            raise ValueError(f"box_loss_weight must be above 0, got {self.box_loss_weight}; 1 is plain")
        names = self.modes.split(",")
        if self.adapter_path and not (Path(self.adapter_path) / "config.json").is_file():
            raise ValueError(f"adapter_path {self.adapter_path} has no config.json; give a run's export/adapter, say")
        if not set(names) <= set(MODES) or len(names) != len(set(names)) or "generation" not in names:
            raise ValueError(
                f"modes is {self.modes!r}; expected generation, alone or joined by commas with captioning, retrieval"
            )


# ---------------------------------------------------------------- data


def load_records(cfg: Config, known_good: set[str]) -> tuple[list[Record], list[Record]]:
    """Checked rows: those to train on, and those held out for the validation loss."""
    records = with_problems(load_manifest(cfg.train_data_dir, cfg.train_data_meta))
    records = check_records(records, cfg.train_data_dir, cfg.on_bad_rows, cfg.output_dir, known_good)
    return hold_out(records, cfg.num_validation_samples, cfg.seed)


def mode_names(cfg: Config) -> list[str]:
    """The modes in the order of their backwards: generation, which uses all of the adapter, comes last."""
    return [name for name in MODES if name in cfg.modes.split(",")]


def each_mode(batches: Iterator[dict], modes: Sequence[str]) -> Iterator[dict]:
    """Every micro-batch once for each mode: a mode is a micro-step of the loop."""
    for batch in batches:
        for mode in modes:
            yield {**batch, "mode": mode}


# ---------------------------------------------------------------- encoding


class Encoders:
    """The frozen VAE and text encoder, used before training and then dropped."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype):
        self.device = device
        text_encoder = ChatGLMModel.from_pretrained(
            folder / "text_encoder", dtype=dtype, variant=variant(folder / "text_encoder")
        )
        self.pipeline = KolorsPipeline(
            vae=load_vae(folder, device, torch.float32),
            text_encoder=text_encoder.to(device).eval(),
            tokenizer=ChatGLMTokenizer.from_pretrained(folder / "tokenizer"),
            unet=None,
            scheduler=None,
        )

    @torch.no_grad()
    def prompt(self, text: str) -> dict[str, Tensor]:
        """prompt_embeds (L, D) and pooled_prompt_embeds (D,) as the pipeline encodes them."""
        prompt_embeds, _, pooled_prompt_embeds, _ = self.pipeline.encode_prompt(
            text, self.device, do_classifier_free_guidance=False, max_sequence_length=PROMPT_TOKENS
        )
        return {"prompt_embeds": prompt_embeds[0], "pooled_prompt_embeds": pooled_prompt_embeds[0]}

    def phrase(self, text: str) -> dict[str, Tensor]:
        """phrase_embed (D,), see embed_phrase."""
        return {"phrase_embed": embed_phrase(self.pipeline.tokenizer, self.pipeline.text_encoder, text)}

    @torch.no_grad()
    def image(self, pixels: Tensor, flipped: bool) -> dict[str, Tensor]:
        """pixels (3, H, W) in [-1, 1] -> latents (4, H/8, W/8), the posterior's mode, scaled; with flipped also those
        of the mirrored picture, which are not the mirrored latents."""
        vae = self.pipeline.vae
        views = {"latents": pixels} | ({"latents_flipped": pixels.flip(-1)} if flipped else {})
        return {
            name: vae.encode(view[None].to(self.device)).latent_dist.mode()[0] * vae.config.scaling_factor
            for name, view in views.items()
        }


def variant(folder: Path) -> str | None:
    """ "fp16" where a model folder has weights of that name alone, as hub repositories of Kolors may."""
    files = [file.name for file in folder.glob("*.safetensors")]
    return "fp16" if files and all(".fp16" in name for name in files) else None


def load_vae(folder: Path, device: torch.device, dtype: torch.dtype) -> AutoencoderKL:
    vae = AutoencoderKL.from_pretrained(folder / "vae", dtype=dtype, variant=variant(folder / "vae"))
    return vae.to(device).eval().requires_grad_(False)


def open_cache(cfg: Config, run: Run, folder: Path) -> EmbeddingCache:
    """The embedding cache, with everything but the row that encoded tensors depend on."""
    fingerprint = {
        "model": on_main(
            run, lambda: {part: folder_fingerprint(folder / part) for part in ("vae", "text_encoder", "tokenizer")}
        ),
        "precision": cfg.mixed_precision,
    }
    return EmbeddingCache(cfg.cache_dir or Path(cfg.output_dir) / "embedding_cache", fingerprint, run.rank)


def encode(cfg: Config, run: Run, folder: Path, cache: EmbeddingCache, items: dict[str, tuple]) -> None:
    """Encode what the cache lacks of {key: ("row", record, (width, height)), ("prompt", text) or ("phrase", text)},
    each process its share; encoders leave memory."""
    missing = on_main(run, cache.missing, list(items))
    if missing:
        encoders = Encoders(folder, run.device, DTYPES[cfg.mixed_precision])
        for key in run.progress(missing[run.rank :: run.world_size], "encode"):
            kind, item, *bucket = items[key]
            if kind == "phrase":
                tensors = encoders.phrase(item)
            elif kind == "prompt":
                tensors = encoders.prompt(item)
            else:
                image = resize_and_crop(load_image(item, cfg.train_data_dir, at_least=bucket[0]), bucket[0])
                tensors = encoders.prompt(item.text) | encoders.image(image_to_tensor(image), cfg.random_flip)
            cache.add(key, tensors)
        del encoders
        gc.collect()
        torch.cuda.empty_cache()
    cache.flush()
    run.barrier()
    cache.reload()


def phrase_key(cache: EmbeddingCache, phrase: str) -> str:
    return cache.key(phrase, kind="phrase")


def phrases_of(rows: Iterable[dict]) -> Iterator[str]:
    return (item["phrase"] for row in rows for item in row["objects"])


def layout_row(
    cfg: Config, cache: EmbeddingCache, record: Record, bucket: tuple[int, int], indices: dict[str, tuple[int, ...]]
) -> LayoutRow:
    """A record at its bucket (width, height), for LayoutSamples; indices: of phrases, see index_phrases."""
    objects = objects_in_bucket(record, bucket, cfg.max_objects)
    return LayoutRow(
        key=cache.key(record, bucket, flipped=cfg.random_flip),
        phrase_keys=tuple(phrase_key(cache, item["phrase"]) for item in objects),
        boxes=tuple(item["bbox"] for item in objects),
        phrase_ids=tuple(indices[item["phrase"]] for item in objects),
        add_time_ids=size_conditions(record, bucket),
    )


def validation_layout(cache: EmbeddingCache, row: dict, limit: int) -> dict:
    """A layout to draw, with the encodings of its caption and of the phrases of its `limit` largest objects."""
    objects = largest_first(row["objects"], limit)
    phrase_embeds = [cache[phrase_key(cache, item["phrase"])]["phrase_embed"] for item in objects]
    return {"text": row["text"], "objects": objects, "phrase_embeds": phrase_embeds, **cache[cache.key(row["text"])]}


@dataclass
class Data:
    """What training needs of the data, encoded in the cache."""

    records: list[Record]  # to train on
    buckets: list[tuple[int, int]]  # (width, height) of each
    train_rows: list[LayoutRow]
    held_out_rows: list[LayoutRow]
    layouts: list[dict]  # {text, objects} to draw in validation
    vocabulary: list[int]  # tokens of the phrases to train on


def prepare_data(cfg: Config, run: Run, folder: Path, cache: EmbeddingCache, vocabulary: list[int] | None) -> Data:
    """Check every row, then encode pictures, captions and phrases. vocabulary: a resumed run's, or None to collect
    it."""
    tokenizer = ChatGLMTokenizer.from_pretrained(folder / "tokenizer")
    records, held_out = on_main(run, load_records, cfg, cache.known_good())
    if cfg.validation_layouts:
        layouts = read_layouts(Path(cfg.validation_layouts))
    else:
        layouts = [{"text": record.text, "objects": record.extra["objects"]} for record in held_out[:4]]
    rows, sizes = records + held_out, make_buckets(cfg.resolution)
    buckets = [nearest_bucket(record.width, record.height, sizes) for record in rows]
    given = [record.extra for record in rows]
    if vocabulary is None:
        vocabulary = build_vocabulary(tokenizer, phrases_of(given[: len(records)]))
    indices = index_phrases(tokenizer, phrases_of(given), vocabulary)
    encoded = [layout_row(cfg, cache, record, bucket, indices) for record, bucket in zip(rows, buckets, strict=True)]
    items = {row.key: ("row", *item) for row, *item in zip(encoded, rows, buckets, strict=True)}
    items |= {phrase_key(cache, phrase): ("phrase", phrase) for phrase in {*indices, *phrases_of(layouts)}}
    items |= {cache.key(text): ("prompt", text) for text in ("", *(row["text"] for row in layouts))}
    encode(cfg, run, folder, cache, items)
    boxes = sum(len(row.boxes) for row in encoded)
    lost = sum(len(row["objects"]) for row in given) - boxes
    run.print(f"{len(records)} rows to train on, {len(held_out)} held out; {describe_buckets(buckets)}")
    run.print(f"{boxes} boxes, {lost} more were cut away by crops or over max_objects")
    count = len(records)
    return Data(records, buckets[:count], encoded[:count], encoded[count:], layouts, vocabulary)


# ---------------------------------------------------------------- models


@dataclass
class Models:
    """What compute_loss, validate, save and export need."""

    model: torch.nn.Module  # SpatialModel as the strategy wraps it; call this one
    scheduler_config: dict
    alphas_cumprod: Tensor  # (training timesteps,) float32: the share of the picture in a noisy one, squared
    empty_prompt: dict[str, Tensor]  # prompt_embeds (L, D) and pooled_prompt_embeds (D,) of ""
    dtype: torch.dtype  # what the UNet computes in
    flops: dict[str, float]  # of one sample's micro-step, by mode, for each pixel of its latents
    schedule: None = None  # the learning rate is a function of the step: no state to keep
    ema: None = None  # no averaged weights in this recipe
    data_digest: str = ""  # of rows and buckets, to notice on resume that the data changed
    vae: AutoencoderKL | None = None
    validation_layouts: list[dict] = dataclasses.field(default_factory=list)  # text, objects and their encodings
    held_out: LayoutSamples | None = None


def load_unet(cfg: Config, run: Run, folder: Path | None, dtype: torch.dtype) -> UNet2DConditionModel:
    """The frozen UNet on the device in its compute dtype; random weights of the full size for the benchmark."""
    with init_empty_weights():
        unet = UNet2DConditionModel.from_config(
            UNet2DConditionModel.load_config(folder / "unet") if folder else FULL_SIZE
        )
    read = safetensors_reader(folder / "unet", set(unet.state_dict())) if folder else random_reader(0, run.device)
    load_weights(unet.requires_grad_(False), read, dtype, run.device)
    if cfg.gradient_checkpointing:
        checkpoint_activations(unet)
    if cfg.compile:
        torch._dynamo.config.recompile_limit = 64  # modes, training and validation, and sizes: each is a variant
        for module in unet.modules():
            if isinstance(module, BasicTransformerBlock | ResnetBlock2D):
                module.compile()
    return unet


def checkpoint_activations(unet: UNet2DConditionModel) -> None:
    """Gradient checkpointing without saving generators' states, which CUDA graphs cannot read: nothing in the UNet is
    random."""
    unet.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False, preserve_rng_state=False))


def load_or_make_adapter(cfg: Config, unet: UNet2DConditionModel, vocabulary: list[int]) -> SpatialAdapter:
    """The adapter to train, in float32: new, or the one of adapter_path."""
    if cfg.adapter_path:
        adapter = load_adapter(cfg.adapter_path, unet)
        adapter.cfg.vocabulary = vocabulary
    else:
        adapter = new_adapter(
            unet,
            rank=cfg.adapter_rank,
            injection=cfg.injection,
            query_positions=cfg.query_positions,
            box_bias=cfg.box_bias,
            max_objects=cfg.max_objects,
            vocabulary=vocabulary,
        )
    return adapter.to(unet.device, torch.float32).train().requires_grad_(True)


def describe_parameters(model: SpatialModel) -> str:
    """How many parameters train, by part."""
    parts = {"adapter": model.adapter, "captioning head": model.captioning, "retrieval head": model.retrieval}
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items() if part is not None}
    said = ", ".join(f"{name} {count / 1e6:.2f}M" for name, count in counts.items())
    frozen = sum(p.numel() for p in model.unet.parameters())
    return f"trains {said}, at {len(model.adapter.layers)} cross-attentions of a frozen UNet of {frozen / 1e6:.1f}M"


def noise_schedule(config: dict) -> Tensor:
    """alphas_cumprod of the checkpoint's own scheduler. ValueError for a prediction type that this recipe lacks."""
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction"):
        raise ValueError(f"the scheduler's prediction_type is {prediction!r}; expected epsilon or v_prediction")
    return getattr(diffusers, config["_class_name"]).from_config(config).alphas_cumprod.float()


@lru_cache
def mode_flops(unet_config: str, side: int) -> dict[str, float]:
    """FLOPs of one sample's micro-step by mode for latents of side x side (matrix products and attention of the UNet,
    2 a multiply-add), as the meter counts: it multiplies by 3 for a forward and both gradients, and frozen weights
    have no gradient of their own. unet_config: JSON. Counted on a UNet without memory."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(json.loads(unet_config))
        cfg = unet.config
        width = cfg.encoder_hid_dim or cfg.cross_attention_dim
        pooled = cfg.projection_class_embeddings_input_dim - 6 * cfg.addition_time_embed_dim
        batch = {
            "noisy_latents": torch.empty(1, cfg.in_channels, side, side),
            "timesteps": torch.zeros(1),
            "prompt_embeds": torch.empty(1, PROMPT_TOKENS, width),
            "pooled_prompt_embeds": torch.empty(1, pooled),
            "add_time_ids": torch.empty(1, 6),
        }
        calls = {
            "generation": (2, predict_noise, ()),
            "captioning": (2, unet_features, (REGION_FEATURES,)),
            "retrieval": (1, unet_features, (IMAGE_FEATURES,)),
        }
        flops = {}
        for mode, (passes, function, arguments) in calls.items():
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                function(unet, *arguments, batch)
            flops[mode] = counter.get_total_flops() * passes / 3
    return flops


# ---------------------------------------------------------------- loss


def add_noise(latents: Tensor, noise: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """(B, 4, h, w) latents and noise, (B,) shares -> sqrt(a) latents + sqrt(1 - a) noise (arXiv 2006.11239)."""
    share = alphas_cumprod[:, None, None, None]
    return share.sqrt() * latents + (1 - share).sqrt() * noise


def prediction_target(latents: Tensor, noise: Tensor, alphas_cumprod: Tensor, scheduler_config: dict) -> Tensor:
    """What the UNet predicts: the noise, or v = sqrt(a) noise - sqrt(1 - a) latents (arXiv 2202.00512)."""
    if scheduler_config.get("prediction_type", "epsilon") == "epsilon":
        return noise
    share = alphas_cumprod[:, None, None, None]
    return share.sqrt() * noise - (1 - share).sqrt() * latents


def snr_weights(alphas_cumprod: Tensor, power: float) -> Tensor:
    """(T,) weights of the squared error by timestep: the signal-to-noise ratio a / (1 - a) to the minus `power`, with
    mean 1. For noise prediction power 1 is the picture's error, 0.5 the loss of arXiv 2310.08442."""
    weights = ((1 - alphas_cumprod) / alphas_cumprod) ** power
    return weights / weights.mean()


def compute_loss(models: Models, batch: dict, cfg: Config) -> tuple[Tensor, dict]:
    """One micro-batch's loss in one mode, and what the meter adds up.

    Noise, timestep, dropouts and flip depend on (seed, step, position) alone. Captioning and retrieval look at a
    lightly noised picture without a caption, which would tell them the answer.
    """
    device, mode = models.alphas_cumprod.device, batch["mode"]
    rngs = fm.sample_rngs(cfg.seed, batch["step"], batch["positions"])
    time, caption, grounding, mirror = (fm.draw_uniform(rngs).to(device) for _ in range(4))  # (B,) each
    latents, boxes = batch["latents"].to(device), batch["boxes"].to(device)  # (B, 4, H/8, W/8), (B, N, 4)
    noise = fm.draw_normal(rngs, latents.shape[1:]).to(device)  # (B, 4, H/8, W/8)
    if "latents_flipped" in batch:
        mirrored = mirror < 0.5
        latents = torch.where(mirrored[:, None, None, None], batch["latents_flipped"].to(device), latents)
        boxes = torch.where(mirrored[:, None, None], flip_boxes(boxes), boxes)

    has_box, without_caption = batch["has_box"].to(device), caption < cfg.caption_dropout  # (B, N), (B,)
    if mode == "generation":
        has_box = has_box & (grounding >= cfg.grounding_dropout)[:, None]
    else:
        time, without_caption = torch.full_like(time, cfg.feature_time), torch.ones_like(without_caption)
    timesteps = (time * len(models.alphas_cumprod)).long().clamp(max=len(models.alphas_cumprod) - 1)  # (B,)
    shares = models.alphas_cumprod[timesteps]  # (B,)
    inputs = {name: batch[name].to(device) for name in ("phrases", "phrase_ids", "add_time_ids", "rows")}
    for name, empty in models.empty_prompt.items():  # (B, L, D) and (B, D)
        given = batch[name].to(device)
        dropped = without_caption.view(-1, *[1] * (given.ndim - 1))
        inputs[name] = torch.where(dropped, empty, given)
    inputs |= {"boxes": boxes, "has_box": has_box, "timesteps": timesteps}
    inputs["loss_weights"] = snr_weights(models.alphas_cumprod, cfg.snr_power)[timesteps]  # (B,)
    inputs["noisy_latents"] = add_noise(latents, noise, shares)
    inputs["target"] = prediction_target(latents, noise, shares, models.scheduler_config)

    loss = models.model(mode, inputs)
    weight = {"captioning": cfg.captioning_weight, "retrieval": cfg.retrieval_weight}.get(mode, 1.0)
    return weight * loss, {
        f"{mode}_loss": loss * len(mode_names(cfg)),  # the meter takes the mean over the micro-steps of all modes
        "latents_mean": latents.mean(),
        "latents_std": latents.std(),
        "forward_flops": models.flops[mode] * latents[:, 0].numel(),
        "samples": len(latents) if mode == "generation" else 0,
    }


# ---------------------------------------------------------------- validation


@torch.no_grad()
def validate(run: Run, cfg: Config, models: Models, step: int) -> None:
    """Pictures by the unmodified pipeline with their boxes drawn in, and the held-out generation loss at fixed
    timesteps and noise. Every process does its share."""
    model = run.unwrap(models.model).eval()
    loss = held_out_loss(run, models, model, cfg)
    draw_validation_images(run, cfg, models, model, Path(cfg.output_dir) / "validation_images" / f"step_{step:06d}")
    model.train()
    gates = [abs(value) for value in gate_values(model.adapter).values()]
    if run.is_main and loss is not None:
        row = {"step": step, "validation_loss": loss, "mean_gate": sum(gates) / len(gates), "largest_gate": max(gates)}
        append_row(Path(cfg.output_dir) / "validation.jsonl", row)
        run.print(f"step {step}: held-out loss {loss:.4f}, mean gate {row['mean_gate']:.4f}")
    run.barrier()


def held_out_loss(run: Run, models: Models, model: SpatialModel, cfg: Config) -> float | None:
    """Mean squared error over held-out rows x VALIDATION_TIMES with their captions and boxes, the same noise every
    time: comparable between steps and runs."""
    if not models.held_out:
        return None
    total = torch.zeros(2, dtype=torch.float64, device=run.device)
    for index in range(run.rank, len(models.held_out), run.world_size):
        row = {name: tensor[None].to(run.device) for name, tensor in models.held_out.sample(index).items()}
        noise = fm.draw_normal(fm.sample_rngs(cfg.seed, 0, [index]), row["latents"].shape[1:]).to(run.device)
        for time in VALIDATION_TIMES:
            row["timesteps"] = torch.tensor([int(time * len(models.alphas_cumprod))], device=run.device)
            share = models.alphas_cumprod[row["timesteps"]]
            row["noisy_latents"] = add_noise(row["latents"], noise, share)
            target = prediction_target(row["latents"], noise, share, models.scheduler_config)
            prediction = model.unet_with(model.layout(row, row["has_box"]), predict_noise, row)
            error = (prediction.float() - target).pow(2).mean().double()
            total += torch.stack([error, torch.ones_like(error)])
    if run.world_size > 1:
        torch.distributed.all_reduce(total)
    return (total[0] / total[1]).item()


def draw_validation_images(run: Run, cfg: Config, models: Models, model: SpatialModel, folder: Path) -> None:
    """Process r draws layouts r, r + world size, ...; the main process then joins them into grid.png."""
    folder.mkdir(parents=True, exist_ok=True)
    scheduler = getattr(diffusers, models.scheduler_config["_class_name"]).from_config(models.scheduler_config)
    pipeline = KolorsPipeline(vae=models.vae, text_encoder=None, tokenizer=None, unet=model.unet, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    for index in range(run.rank, len(models.validation_layouts), run.world_size):
        row = models.validation_layouts[index]
        prompts = {name: row[name][None].to(run.device, models.dtype) for name in models.empty_prompt}
        empty = {f"negative_{name}": t[None].to(run.device, models.dtype) for name, t in models.empty_prompt.items()}
        call = {
            **prompts,
            **empty,
            "guidance_scale": cfg.guidance_scale,
            "width": cfg.resolution,
            "height": cfg.resolution,
            "num_inference_steps": cfg.num_inference_steps,
            "generator": torch.Generator().manual_seed(cfg.seed + index),
        }
        boxes = [item["bbox"] for item in row["objects"]]
        image = draw_embedded(pipeline, model.adapter, call, row["phrase_embeds"], boxes, cfg.tau)
        image.save(folder / f"{index:03d}.png")
        show_boxes(image, row["objects"]).save(folder / f"{index:03d}_boxes.png")
        (folder / f"{index:03d}.txt").write_text(row["text"] + "\n")
    run.barrier()
    if run.is_main and models.validation_layouts:
        save_grid(folder, [row["text"] for row in models.validation_layouts])


# ---------------------------------------------------------------- saving


def save(
    run: Run, cfg: Config, models: Models, optimizer: torch.optim.Optimizer, sampler: MicroBatchSampler, step: int
) -> None:
    """checkpoint-<step> with all that an exact resume needs: what trains, the queue, optimizer, the sampler's place;
    and the adapter's config.json, so that load_adapter reads it too."""
    state = {"segments": sampler.segments_at(step), "data": models.data_digest, "config": dataclasses.asdict(cfg)}
    adapter = run.unwrap(models.model).adapter
    files = {"config.json": json.dumps(dataclasses.asdict(adapter.cfg), indent=1)}
    folder = save_checkpoint(
        run, cfg.output_dir, step, models.model, optimizer, None, state, cfg.checkpoints_total_limit, files
    )
    run.print(f"saved {folder}")


def export(run: Run, cfg: Config, models: Models) -> None:
    """export/adapter: what load_adapter reads."""
    if run.is_main:
        save_adapter(run.unwrap(models.model).adapter, Path(cfg.output_dir) / "export" / "adapter")
    run.barrier()


# ---------------------------------------------------------------- main


def main(argv: list[str] | None = None) -> None:
    cfg = parse_config(Config, argv)
    resolve_paths(cfg, RECIPE, argv)
    modes = mode_names(cfg)
    run = runtime.set_up(cfg, RECIPE, backwards=len(modes), find_unused_parameters=False)
    accelerator, accumulation = run.accelerator, cfg.gradient_accumulation_steps * len(modes)
    if run.strategy.startswith("zero") and cfg.mixed_precision == "fp16":
        raise ValueError("mixed_precision fp16 is not set up for DeepSpeed here; use bf16 or no, or LAUNCH=ddp")
    resume = on_main(run, find_checkpoint, cfg.output_dir, cfg.resume_from_checkpoint)
    on_main(run, claim_output_dir, cfg.output_dir, resume, cfg.overwrite_output_dir, False)

    dtype = DTYPES[cfg.mixed_precision]
    vocabulary = json.loads((resume / "config.json").read_text())["vocabulary"] if resume else None
    if cfg.benchmark:
        folder, scheduler_config, vocabulary = None, FULL_SIZE_SCHEDULER, list(range(2000))
    else:
        folder = on_main(run, model_folder, cfg.pretrained_model_name_or_path, PARTS)
        scheduler_config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
        cache = open_cache(cfg, run, folder)
    alphas_cumprod = noise_schedule(scheduler_config).to(run.device)
    if not cfg.benchmark:
        data = prepare_data(cfg, run, folder, cache, vocabulary)
        vocabulary = data.vocabulary

    unet = load_unet(cfg, run, folder, dtype)
    torch.manual_seed(cfg.seed)  # new weights are the same in every run and on every process
    adapter = load_or_make_adapter(cfg, unet, vocabulary)
    spatial_model = SpatialModel(unet, adapter, modes, cfg.retrieval_queue, cfg.box_loss_weight).to(run.device)
    if cfg.cuda_graphs and run.device.type == "cuda":
        spatial_model.graphs = UNetGraphs(unet, adapter)
    run.print(describe_parameters(spatial_model))
    check_disk(run, cfg, sum(p.numel() for p in spatial_model.parameters() if p.requires_grad))
    unet_config, side = unet.to_json_string(), cfg.resolution // 8
    if cfg.benchmark:
        dataset = RandomLayouts(
            side, PROMPT_TOKENS, unet.config.encoder_hid_dim, adapter.cfg.max_objects, len(vocabulary)
        )
        bucket_ids = [0] * len(dataset)
        sample = dataset[Place(0, 0, 0)]
        empty_prompt = {name: sample[name] for name in ("prompt_embeds", "pooled_prompt_embeds")}
    else:
        dataset = LayoutSamples(cache, data.train_rows, adapter.cfg.max_objects)
        bucket_ids = data.buckets
        empty_prompt = cache[cache.key("")]
    if cfg.num_train_epochs:
        group_size = cfg.train_batch_size * cfg.gradient_accumulation_steps * run.world_size
        cfg.max_train_steps = -(-cfg.num_train_epochs * len(dataset) // group_size)

    optimizer = build_optimizer(spatial_model, cfg, run.strategy, run.offload)
    model, optimizer = runtime.prepare(run, spatial_model.train(), optimizer, cfg)
    models = Models(
        model=model,
        scheduler_config=scheduler_config,
        alphas_cumprod=alphas_cumprod,
        empty_prompt={name: tensor.to(run.device) for name, tensor in empty_prompt.items()},
        dtype=dtype,
        flops={mode: flops / side**2 for mode, flops in mode_flops(unet_config, side).items()},
    )
    if not cfg.benchmark:
        models.data_digest = data_digest(data.records, data.buckets)
    if cfg.validation_steps and not cfg.benchmark:
        models.vae = load_vae(folder, run.device, dtype)
        models.held_out = LayoutSamples(cache, data.held_out_rows, adapter.cfg.max_objects)
        models.validation_layouts = [validation_layout(cache, row, adapter.cfg.max_objects) for row in data.layouts]

    step, segments = 0, []
    if resume:
        state = load_checkpoint(run, resume, model, optimizer, None)
        step, segments = state["step"], state["segments"]
        run.print(f"resumed from {resume} at step {step}; settings changed since: {changed_settings(state, cfg)}")
        if state["data"] != models.data_digest:
            run.print("the data changed since that checkpoint: the order of samples is not a continuation of it")
    sampler = MicroBatchSampler(
        bucket_ids,
        cfg.train_batch_size,
        cfg.gradient_accumulation_steps,
        run.rank,
        run.world_size,
        cfg.seed,
        segments,
        step,
    )
    on_main(run, claim_output_dir, cfg.output_dir, resume, cfg.overwrite_output_dir)  # now deletes what was there
    if run.is_main:
        save_config(cfg, Path(cfg.output_dir) / "config.yaml")
        write_environment(run, cfg)
    meter = Meter(run, cfg, step)
    loader = make_loader(dataset, sampler, collate, cfg.dataloader_num_workers, cfg.seed)
    batches = meter.watch(each_mode(loader, modes))
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
        export(run, cfg, models)
        print_next_steps(run, cfg)
    accelerator.end_training()  # ends the processes' group too: nothing collective may follow


def print_next_steps(run: Run, cfg: Config) -> None:
    run.print(
        f"\ndone. Look at\n  {cfg.output_dir}/validation_images/ (grid.png in each step's folder)\n"
        f"  {cfg.output_dir}/curves.png\n"
        f"measure whether boxes are obeyed:\n"
        f"  {sys.executable} {RECIPE / 'evaluate.py'} --run {cfg.output_dir}\n"
        f"draw from the result:\n"
        f"  {sys.executable} {RECIPE / 'sample.py'} --run {cfg.output_dir} --prompt \"...\" --objects '[...]'\n"
        f"train your own:\n  bash {RECIPE / 'run.sh'} full --train_data_dir /data/mine"
    )


if __name__ == "__main__":
    with explained_errors(MEMORY_ADVICE):
        main()
