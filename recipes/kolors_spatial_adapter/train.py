"""A spatial adapter for Kolors: boxes with phrases say what stands where. The UNet stays frozen; about 50 million
parameters at its cross-attentions train. Read it top to bottom.

    bash run.sh                                           the tiny model and drawn data, on any machine
    bash run.sh full --train_data_dir /data/mine          the real model, on the machine that configs/full.yaml names
    python train.py --dataset layout                      on what label_layouts.py wrote to data/layout_dataset.jsonl

Order: Config, encoding, data, model, loss, validation, main with the loop. The adapter is in adapter.py, the three
modes and their losses in modes.py, rows with boxes in layouts.py and boxes.py; the settings that all recipes share are
in common/settings.py.
"""

import copy
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

RECIPE = Path(__file__).resolve().parent
sys.path[:0] = [str(RECIPE), str(next(folder for folder in RECIPE.parents if (folder / "common").is_dir()))]

import common.quiet  # noqa: F401, isort: skip
import layouts
import torch
from adapter import LOAD, draw_embedded, gate_values, read_config, save_adapter, start_adapter
from boxes import flip_boxes, show_boxes
from diffusers import AutoencoderKL, KolorsPipeline, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.pipelines.kolors import ChatGLMTokenizer
from diffusion_noise import add_noise, make_scheduler, noise_schedule, prediction_target, snr_weights
from frozen_encoders import Encoders, load_vae, sample_to_look_at
from graphs import UNetGraphs, checkpoint_activations
from modes import MODES, PROMPT_TOKENS, SpatialModel, each_mode, mode_flops, sample_errors
from torch import Tensor

from common import image_settings, rules, settings
from common.data import cache, check, encoding, loader, order
from common.data.cache import EmbeddingCache
from common.model import loading
from common.model.card import write_card
from common.model.ema import evaluating
from common.processes import Run
from common.record import checkpoint, metrics, pictures
from common.start import config, dry_run, folders, launch, plan
from common.step import flow_matching as fm
from common.step import optimizers, steps

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
VALIDATION_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)  # shares of the training timesteps
NONFINITE_STEPS = 8  # in a row that fp16's loss scale may need until it fits
BENCHMARK_VOCABULARY = range(2000)  # tokens of phrases
MEMORY_ADVICE = (
    "In this order, try: --gradient_checkpointing; --train_batch_size 1 with accumulation; a smaller --resolution; "
    "--modes generation does not help (a mode's memory is free before the next begins); --optimizer adamw_8bit; "
    "LAUNCH=zero2 (optimizer state in RAM)"
)
SECOND_NAMES = {
    "dataset": "train_data_dir",
    "batch_size": "train_batch_size",
    "grad_accumulation_steps": "gradient_accumulation_steps",
    "precision": "mixed_precision",
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
}
SKIPPED = {"multiprocessing_distributed": "torchrun, deepspeed and accelerate say how many processes there are"}
NEXT_STEPS = {
    "measure whether boxes are obeyed": "evaluate.py --run {run}",
    "draw from the result": "sample.py --run {run} --prompt \"...\" --objects '[...]'",
}


@dataclass
class Config:
    """This recipe's settings: its own, and the groups of common/settings.py. All flags are flat. train_data_dir
    "layout" is data/layout_dataset.jsonl of the working directory and its pictures, as label_layouts.py writes it."""

    pretrained_model_name_or_path: str = "Kwai-Kolors/Kolors-diffusers"
    """local folder or a hub name; "tiny" is the embedded model that make_tiny.py builds"""
    adapter_path: str | None = None
    """folder of an adapter to start from, for example export/adapter of an earlier run (its shape is then its own)"""
    resolution: int = 1024
    """target area is resolution squared, in aspect-ratio buckets"""
    random_flip: bool = False
    """mirror half of the samples, boxes or sources with them; texts stay, so not for data that says left or right"""
    cuda_graphs: bool = False
    """record the UNet's kernels once for each mode and size of pictures, and launch them together: at batch 1 a GPU
    otherwise waits for launches most of the time; no effect without a GPU"""
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
    validation_layouts: str | None = None
    """JSONL file of rows {text, objects} to draw; four held-out rows when not given"""
    tau: float = 1.0
    """share of the sampling steps, the first ones, in which the adapter acts in validation pictures"""

    run: settings.Flat[settings.Run] = field(default_factory=settings.Run)
    data: settings.Flat[settings.Data] = field(default_factory=settings.Data)
    pictures: settings.Flat[image_settings.Pictures] = field(default_factory=image_settings.Pictures)
    batch: settings.Flat[settings.Batch] = field(default_factory=settings.Batch)
    precision: settings.Flat[settings.AdapterPrecision] = field(default_factory=settings.AdapterPrecision)
    speed: settings.Flat[settings.Speed] = field(default_factory=settings.Speed)
    tuning: settings.Flat[settings.AdapterTuning] = field(default_factory=settings.AdapterTuning)
    optim: settings.Flat[settings.Optim] = field(default_factory=lambda: settings.Optim(learning_rate=1e-4))
    validation: settings.Flat[settings.Validation] = field(default_factory=settings.Validation)
    drawing: settings.Flat[image_settings.Drawing] = field(
        default_factory=lambda: image_settings.Drawing(guidance_scale=5.0)
    )

    def check(self) -> None:
        rules.multiple_of(self, "resolution", 32, "VAE 8 x UNet 4")
        rules.between(self, 32, 8192, "resolution")
        rules.multiple_of(self, "adapter_rank", 32, "width of a head")
        rules.between(self, 1, 4096, "adapter_rank", "max_objects")
        rules.between(self, 1, 2**20, "retrieval_queue")
        rules.within(self, 0, 1, "grounding_dropout", "feature_time", "tau")
        if not self.box_loss_weight > 0:
            raise ValueError(f"box_loss_weight must be above 0, got {self.box_loss_weight}; 1 is plain")
        if self.adapter_path and not (Path(self.adapter_path) / "config.json").is_file():
            raise ValueError(f"adapter_path {self.adapter_path} has no config.json; give a run's export/adapter, say")
        names = self.modes.split(",")
        if not set(names) <= set(MODES) or len(names) != len(set(names)) or "generation" not in names:
            raise ValueError(
                f"modes is {self.modes!r}; expected generation, alone or joined by commas with captioning, retrieval"
            )

    def mode_names(self) -> list[str]:
        """The modes in the order of their backwards: generation, which uses all of the adapter, comes last."""
        return [name for name in MODES if name in self.modes.split(",")]

    def slots(self) -> int:
        """Boxes that a picture has room for: of the adapter to start from, or max_objects."""
        return read_config(self.adapter_path).max_objects if self.adapter_path else self.max_objects


# ---------------------------------------------------------------- encoding: what a row becomes, before training


def encode(cfg: Config, run: Run, folder: Path, embeddings: EmbeddingCache, items: dict[str, tuple]) -> None:
    """Add what the encoders make of ("row", record, (width, height)), ("prompt", text) or ("phrase", text)."""
    encoders = Encoders(cfg, folder, run.device, run.compute_dtype)
    encoding.encode_items(run, embeddings, items, encoders, cfg.pictures)


# ---------------------------------------------------------------- data


def prepare_data(cfg: Config, run: Run, folder: Path) -> tuple[loader.Data, list[int]]:
    """Check every row, choose its bucket, encode what is not in the cache yet. Beside the data: the tokens that
    captioning can say, which a run that goes on has from its checkpoint."""
    parts, precision = ("vae", "text_encoder", "tokenizer"), cfg.precision.mixed_precision
    embeddings = cache.open_cache(run, cfg.pictures.cache_dir, cfg.run.output_dir, folder, parts, precision=precision)
    train, held_out = check.load_records(cfg, run, embeddings.known_good(), layouts.row_problem)
    shown = [{"text": row.text, "objects": row.extra["objects"]} for row in held_out[:4]]
    shown = layouts.read_layouts(Path(cfg.validation_layouts)) if cfg.validation_layouts else shown
    rows, n = train + held_out, len(train)
    buckets = order.choose_buckets(rows, cfg.resolution)  # (width, height)
    tokenizer = ChatGLMTokenizer.from_pretrained(folder / "tokenizer")
    phrases = layouts.phrases_of(row.extra for row in train)
    vocabulary = read_config(run.resume).vocabulary if run.resume else layouts.build_vocabulary(tokenizer, phrases)
    indices = layouts.index_phrases(tokenizer, layouts.phrases_of(row.extra for row in rows), vocabulary)
    most = min(cfg.max_objects, cfg.slots())
    placed = [
        layouts.layout_row(embeddings, row, bucket, indices, most, cfg.random_flip)
        for row, bucket in zip(rows, buckets, strict=True)
    ]
    wanted = loader.rows_to_encode(run, cfg, rows, buckets[:n])
    items: dict[str, tuple] = {placed[number].key: ("row", row, buckets[number]) for number, row in wanted.items()}
    phrases = {*layouts.phrases_of(row.extra for row in wanted.values()), *layouts.phrases_of(shown)}
    items |= {layouts.phrase_key(embeddings, phrase): ("phrase", phrase) for phrase in phrases}
    texts = ("", *(row["text"] for row in shown), *loader.other_texts(wanted.values()))
    items |= {embeddings.key(text): ("prompt", text) for text in texts}
    cache.encode_missing(run, embeddings, items, partial(encode, cfg, run, folder, embeddings))

    boxes = sum(len(row.boxes) for row in placed)
    lost = sum(len(row.extra["objects"]) for row in rows) - boxes
    run.print(f"{n} rows to train on, {len(held_out)} held out; {order.describe_buckets(rows, buckets)}")
    run.print(f"{boxes} boxes, {lost} more were cut away by crops or over max_objects")
    samples = layouts.LayoutSamples(embeddings, placed[:n], cfg.slots())
    unseen = layouts.LayoutSamples(embeddings, placed[n:], cfg.slots())
    data = loader.Data(
        dataset=samples,
        bucket_ids=buckets[:n],
        digest=order.data_digest(train, buckets[:n]),
        empty_prompt=embeddings[embeddings.key("")],
        held_out=[unseen.sample(number) for number in range(len(unseen))],
        shown=[layouts.layout_to_draw(embeddings, row, cfg.slots()) for row in shown],
    )
    return data, vocabulary


def random_sample(cfg: Config, unet: dict, rng: torch.Generator) -> dict[str, Tensor]:
    """What one encoded row looks like at full size, half of its places taken; unet: its config. The benchmark's
    data."""
    side, slots, width = cfg.resolution // 8, cfg.slots(), unet["encoder_hid_dim"]
    corners = torch.rand(slots, 2, generator=rng) * 0.7
    return {
        "latents": torch.randn(4, side, side, generator=rng),
        "prompt_embeds": torch.randn(PROMPT_TOKENS, width, generator=rng, dtype=torch.bfloat16),
        "pooled_prompt_embeds": torch.randn(width, generator=rng, dtype=torch.bfloat16),
        "phrases": torch.randn(slots, width, generator=rng),
        "boxes": torch.cat([corners, corners + 0.25], dim=1),
        "has_box": torch.arange(slots) < slots // 2,
        "phrase_ids": torch.randint(len(BENCHMARK_VOCABULARY), (slots, 8), generator=rng),
        "add_time_ids": torch.tensor([side * 8, side * 8, 0, 0, side * 8, side * 8]),
        "rows": torch.randint(2**31, (), generator=rng),  # a number of the row
    }


# ---------------------------------------------------------------- model


@dataclass
class Models:
    """What compute_loss and validate call, and what they need of it."""

    model: torch.nn.Module  # SpatialModel as the strategy wraps it; call this one
    scheduler_config: dict
    alphas_cumprod: Tensor  # (training timesteps,) float32: the share of the picture in a noisy one, squared
    empty_prompt: dict[str, Tensor]  # prompt_embeds (L, D) and pooled_prompt_embeds (D,) of ""
    dtype: torch.dtype  # what the UNet computes in
    flops: dict[str, float]  # of one sample's micro-step, by mode, for each pixel of its latents
    ema: None = None  # no averaged weights in this recipe
    vae: AutoencoderKL | None = None  # for validation's pictures


def load_unet(cfg: Config, run: Run, unet: UNet2DConditionModel, weights: Path) -> UNet2DConditionModel:
    """Fill the frozen UNet on the device, in its compute dtype: checkpointed, compiled."""
    read = loading.weights_reader(run, weights, set(unet.state_dict()), cfg.run.seed)
    loading.load_weights(unet.requires_grad_(False), read, run.compute_dtype, run.device)
    if cfg.speed.gradient_checkpointing:
        checkpoint_activations(unet)
    if cfg.speed.compile:
        torch._dynamo.config.recompile_limit = 64  # modes, training and validation, and sizes: each is a variant
        for module in unet.modules():
            if isinstance(module, BasicTransformerBlock | ResnetBlock2D):
                module.compile()
    return unet


def make_model(cfg: Config, run: Run, unet: UNet2DConditionModel, vocabulary: Sequence[int]) -> SpatialModel:
    """The UNet with the adapter and the heads of the modes."""
    torch.manual_seed(cfg.run.seed)  # new weights are the same in every run and on every process
    adapter = start_adapter(
        unet,
        cfg.adapter_path,
        vocabulary,
        rank=cfg.adapter_rank,
        injection=cfg.injection,
        query_positions=cfg.query_positions,
        box_bias=cfg.box_bias,
        max_objects=cfg.max_objects,
    )
    model = SpatialModel(unet, adapter, cfg.mode_names(), cfg.retrieval_queue, cfg.box_loss_weight).to(run.device)
    if cfg.cuda_graphs and run.device.type == "cuda":
        model.graphs = UNetGraphs(unet, adapter)
    run.print(model.describe())
    return model.train()


# ---------------------------------------------------------------- loss


def at_timesteps(models: Models, latents: Tensor, noise: Tensor, timesteps: Tensor) -> dict[str, Tensor]:
    """What the UNet is given, and what it should predict: latents and noise (B, 4, H/8, W/8), timesteps (B,)."""
    shares = models.alphas_cumprod[timesteps]  # (B,)
    return {
        "timesteps": timesteps,
        "noisy_latents": add_noise(latents, noise, shares),
        "target": prediction_target(latents, noise, shares, models.scheduler_config),
    }


def mode_inputs(models: Models, batch: dict, cfg: Config) -> dict[str, Tensor]:
    """What a mode's loss is computed from. Noise, timestep, dropouts and flip depend on (seed, step, position) alone.

    Captioning and retrieval look at a lightly noised picture without a caption, which would tell them the answer.
    """
    device, n_times = models.alphas_cumprod.device, len(models.alphas_cumprod)
    rngs, drawn = layouts.draws(cfg.run.seed, batch["step"], batch["positions"])
    time, caption, grounding, mirror = (each.to(device) for each in drawn)  # (B,) each
    inputs = {name: value.to(device) for name, value in batch.items() if isinstance(value, Tensor)}
    noise = fm.draw_normal(rngs, inputs["latents"].shape[1:]).to(device)  # (B, 4, H/8, W/8)
    if "latents_flipped" in inputs:
        mirrored = mirror < 0.5
        for name, other in (("latents", inputs.pop("latents_flipped")), ("boxes", flip_boxes(inputs["boxes"]))):
            inputs[name] = torch.where(fm.expand_to(mirrored, other), other, inputs[name])

    without_caption = caption < cfg.pictures.caption_dropout  # (B,)
    if batch["mode"] == "generation":
        inputs["has_box"] = inputs["has_box"] & (grounding >= cfg.grounding_dropout)[:, None]  # (B, N)
    else:
        time, without_caption = torch.full_like(time, cfg.feature_time), torch.ones_like(without_caption)
    for name, empty in models.empty_prompt.items():  # (B, L, D) and (B, D)
        inputs[name] = torch.where(fm.expand_to(without_caption, inputs[name]), empty, inputs[name])
    timesteps = (time * n_times).long().clamp(max=n_times - 1)  # (B,)
    inputs["loss_weights"] = snr_weights(models.alphas_cumprod, cfg.snr_power)[timesteps]  # (B,)
    return inputs | at_timesteps(models, inputs["latents"], noise, timesteps)


def compute_loss(models: Models, batch: dict, cfg: Config) -> tuple[Tensor, dict]:
    """One micro-batch's loss in one mode (modes.py), and what the meter adds up."""
    mode, inputs = batch["mode"], mode_inputs(models, batch, cfg)
    loss = models.model(mode, inputs)
    weight = {"captioning": cfg.captioning_weight, "retrieval": cfg.retrieval_weight}.get(mode, 1.0)
    latents = inputs["latents"]  # (B, 4, H/8, W/8)
    measured = metrics.of_latents(latents) | {
        f"{mode}_loss": loss * len(cfg.mode_names()),  # the meter takes the mean over the micro-steps of all modes
        "forward_flops": models.flops[mode] * latents[:, 0].numel(),
        "samples": len(latents) if mode == "generation" else 0,  # once, not once a mode
    }
    return weight * loss, measured


def trial(cfg: Config, run: Run, model: SpatialModel, batch: dict) -> Iterator[Tensor]:
    """The losses of a batch, mode by mode, on a model without memory: what plan adds up."""
    if cfg.speed.gradient_checkpointing:
        checkpoint_activations(model.unet)
    scheduler = folders.part_config(RECIPE / "full_size" / "scheduler")
    empty = {name: batch[name][:1].to("meta") for name in ("prompt_embeds", "pooled_prompt_embeds")}
    flops = dict.fromkeys(MODES, 0.0)
    models = Models(model, scheduler, noise_schedule(scheduler).to("meta"), empty, run.compute_dtype, flops)
    for mode in cfg.mode_names():
        yield compute_loss(models, {**batch, "mode": mode}, cfg)[0]


# ---------------------------------------------------------------- validation


@torch.no_grad()
def validate(run: Run, cfg: Config, models: Models, data: loader.Data, step: int) -> None:
    """Pictures by the unmodified pipeline with their boxes drawn in, and the held-out generation loss. Every process
    does its share."""
    model = run.unwrap(models.model)
    with evaluating(model, models.ema):
        loss = run.mean_of(held_out_errors(run, cfg, models, data))
        draw_pictures(run, cfg, models, data, pictures.step_folder(cfg.run.output_dir, step))
    gates = [abs(value) for value in gate_values(model.adapter).values()]
    metrics.log_validation(run, cfg, step, loss, mean_gate=sum(gates) / len(gates), largest_gate=max(gates))


def held_out_errors(run: Run, cfg: Config, models: Models, data: loader.Data) -> list[Tensor]:
    """Errors of this process's held-out rows at VALIDATION_TIMES with their captions and boxes, the same noise every
    time: comparable between steps and runs."""
    errors = []
    for index, row, counts in run.in_step(data.held_out):
        found = errors_by_time(run, cfg, models, {**loader.collate([row]), "positions": [index]})
        errors += [error.mean() for error in found.values()] * counts
    return errors


def errors_by_time(run: Run, cfg: Config, models: Models, batch: dict) -> dict[str, Tensor]:
    """{"time 0.1": (B,) errors, ...} of a batch at VALIDATION_TIMES, with its captions and boxes."""
    inputs = {name: value.to(run.device) for name, value in batch.items() if isinstance(value, Tensor)}
    latents, errors = inputs["latents"], {}  # (B, 4, H/8, W/8)
    noise = fm.draw_normal(fm.sample_rngs(cfg.run.seed, 0, batch["positions"]), latents.shape[1:]).to(run.device)
    for time in VALIDATION_TIMES:
        timesteps = torch.full((len(latents),), int(time * len(models.alphas_cumprod)), device=run.device)
        inputs |= at_timesteps(models, latents, noise, timesteps)
        errors[f"time {time:g}"] = sample_errors(run.unwrap(models.model), inputs, box_loss_weight=1.0)
    return errors


def draw_pictures(run: Run, cfg: Config, models: Models, data: loader.Data, folder: Path) -> None:
    """The unmodified pipeline around the UNet with its adapter: pictures, also with their boxes, captions and grid.png
    in folder."""
    model = run.unwrap(models.model)
    scheduler = make_scheduler(models.scheduler_config)
    pipeline = KolorsPipeline(vae=models.vae, text_encoder=None, tokenizer=None, unet=model.unet, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    empty = {f"negative_{name}": t[None].to(run.device, models.dtype) for name, t in models.empty_prompt.items()}
    for index, row, counts in run.in_step(data.shown):
        call = {
            **{name: row[name][None].to(run.device, models.dtype) for name in models.empty_prompt},
            **empty,
            "guidance_scale": cfg.drawing.guidance_scale,
            "width": cfg.resolution,
            "height": cfg.resolution,
            "num_inference_steps": cfg.drawing.num_inference_steps,
            "generator": torch.Generator().manual_seed(cfg.run.seed + index),
        }
        boxes = [item["bbox"] for item in row["objects"]]
        image = draw_embedded(pipeline, model.adapter, call, row["phrase_embeds"], boxes, cfg.tau)
        if counts:
            pictures.save_picture(folder, index, row["text"], image, boxes=show_boxes(image, row["objects"]))
    pictures.save_grid(run, folder, [row["text"] for row in data.shown])


# ---------------------------------------------------------------- main


def export(run: Run, cfg: Config, model: SpatialModel) -> None:
    """export/adapter: what load_adapter reads, and a model card."""
    if run.is_main:
        folder = Path(cfg.run.output_dir) / "export" / "adapter"
        save_adapter(model.adapter, folder)
        write_card(folder, rules.flat(cfg), cfg.batch.max_train_steps, RECIPE.name, LOAD, "a spatial adapter")
    run.barrier()


def main(argv: list[str] | None = None) -> None:
    cfg = config.parse_recipe(Config, argv, SECOND_NAMES, SKIPPED)
    layouts.find_labelled(cfg.data)
    modes, side = cfg.mode_names(), cfg.resolution // 8
    run = launch.set_up(cfg, RECIPE, argv, backwards=len(modes), find_unused_parameters=False)
    folder = folders.model_folder(cfg, run, PARTS, RECIPE / "full_size")
    scheduler_config = folders.part_config(folder / "scheduler")
    alphas_cumprod = noise_schedule(scheduler_config).to(run.device)  # what cannot train is said before the encoding
    unet = loading.empty_model(UNet2DConditionModel, folders.part_config(folder / "unet"))
    empty = make_model(cfg, plan.on_meta(run), copy.deepcopy(unet), BENCHMARK_VOCABULARY)
    plan.check_size(run, cfg, empty, loading.config_of(unet), random_sample, trial)  # said before the encoding
    if run.benchmark:
        data, vocabulary = loader.random_data(cfg, loading.config_of(unet), random_sample), BENCHMARK_VOCABULARY
    else:
        data, vocabulary = prepare_data(cfg, run, folder)
    cfg.batch.max_train_steps = cfg.batch.steps_for(len(data), run.world_size)

    spatial_model = make_model(cfg, run, load_unet(cfg, run, unet, folder / "unet"), vocabulary)
    optimizer = optimizers.build_optimizer(run, spatial_model, cfg.tuning.optimizer, cfg.optim)
    model, optimizer = launch.prepare(run, spatial_model, optimizer)
    models = Models(
        model=model,
        scheduler_config=scheduler_config,
        alphas_cumprod=alphas_cumprod,
        empty_prompt={name: tensor.to(run.device) for name, tensor in data.empty_prompt.items()},
        dtype=run.compute_dtype,
        flops={mode: flops / side**2 for mode, flops in mode_flops(unet.to_json_string(), side).items()},
        vae=load_vae(folder, run.device, run.compute_dtype) if run.validates else None,
    )
    state = checkpoint.resume(run, cfg, model, optimizer, models.ema, data.digest, asdict(spatial_model.adapter.cfg))
    sampler = loader.make_sampler(data, cfg.batch, run, cfg.run.seed, state.segments, state.step)
    if cfg.run.dry_run:
        looks = partial(errors_by_time, run, cfg, models), partial(sample_to_look_at, run, cfg, data, folder)
        return dry_run.show(run, cfg, data, sampler, spatial_model, *looks)
    meter = metrics.start(run, cfg, state, NONFINITE_STEPS if run.accelerator.scaler else 0)  # old results go now
    batches = loader.make_loader(data.dataset, sampler, cfg.data.dataloader_num_workers, cfg.run.seed)
    batches = meter.watch(each_mode(batches, modes))
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

    if meter.close(step):  # there is a result
        export(run, cfg, run.unwrap(model))
        metrics.print_next_steps(run, cfg, metrics.LOOK_AT, NEXT_STEPS)
    run.end()


if __name__ == "__main__":
    with plan.explained_errors(MEMORY_ADVICE):
        main()
