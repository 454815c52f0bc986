"""Full-parameter fine-tuning of FLUX.2 Klein (Flux2Transformer2DModel, 9B or 4B), with or without reference images,
from several GPUs to one 80 GB card. Read it top to bottom.

    bash run.sh                                           the tiny model and drawn data, on any machine
    bash run.sh full --train_data_dir /data/mine          the real model, on the machine that configs/full.yaml names

Order: Config, encoding, data, model, loss, validation, main with the loop. The settings that all recipes share are in
common/settings.py.
"""

import json
import math
import sys
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

RECIPE = Path(__file__).resolve().parent
sys.path[:0] = [str(RECIPE), str(next(folder for folder in RECIPE.parents if (folder / "common").is_dir()))]

import common.quiet  # noqa: F401, isort: skip
import reference_images
import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import Tensor
from transformers import AutoTokenizer, Qwen3ForCausalLM

from common import image_settings, rules, settings
from common.data import cache, check, encoding, loader
from common.data.cache import EmbeddingCache
from common.model import adapters, export, loading
from common.model.ema import Ema, evaluating
from common.processes import Run
from common.record import checkpoint, metrics, pictures
from common.start import config, dry_run, folders, launch, plan
from common.step import flow_matching as fm
from common.step import optimizers, steps

PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
NEXT_STEPS = {"draw from the result": 'sample.py --run {run} --prompt "..."'}


@dataclass
class Config:
    """This recipe's settings: its own, and the groups of common/settings.py. All flags are flat."""

    pretrained_model_name_or_path: str = "black-forest-labs/FLUX.2-klein-base-9B"
    """local folder or a hub name; "tiny" is the embedded model that make_tiny.py builds"""
    allow_distilled: bool = False
    """train a step-distilled checkpoint all the same (it loses its few-step sampling; take the base model instead)"""
    max_sequence_length: int = 512
    """prompt tokens kept, as the pipeline's default"""
    shift_rule: Literal["flux1", "empirical"] = "flux1"
    """what the checkpoint's shift is: flux1, linear from 0.5 at 256 tokens to 1.15 at 4096; empirical, the larger one
    that the pipeline samples with, at num_inference_steps"""
    validation_image_paths: tuple[str, ...] = ()
    """source image of each validation prompt, several of one prompt joined by commas, '' for text alone"""
    benchmark_prompt_tokens: int = 512
    """prompt length of the benchmark"""

    run: settings.Flat[settings.Run] = field(default_factory=settings.Run)
    data: settings.Flat[settings.Data] = field(default_factory=settings.Data)
    pictures: settings.Flat[image_settings.Pictures] = field(default_factory=image_settings.Pictures)
    buckets: settings.Flat[image_settings.Buckets] = field(default_factory=image_settings.Buckets)
    batch: settings.Flat[settings.Batch] = field(default_factory=settings.Batch)
    precision: settings.Flat[settings.Precision] = field(default_factory=settings.Precision)
    speed: settings.Flat[settings.Speed] = field(default_factory=settings.Speed)
    tuning: settings.Flat[settings.FullTuning] = field(default_factory=settings.FullTuning)
    lora: settings.Flat[settings.Lora] = field(default_factory=settings.Lora)
    optim: settings.Flat[settings.Optim] = field(default_factory=settings.Optim)
    flow: settings.Flat[image_settings.FlowMatching] = field(default_factory=image_settings.FlowMatching)
    validation: settings.Flat[settings.Validation] = field(default_factory=settings.Validation)
    drawing: settings.Flat[image_settings.Drawing] = field(default_factory=image_settings.Drawing)
    prompts: settings.Flat[image_settings.Prompts] = field(default_factory=image_settings.Prompts)

    def check(self) -> None:
        rules.between(self, 1, 4096, "max_sequence_length", "benchmark_prompt_tokens")


# ---------------------------------------------------------------- encoding: what a row becomes, before training


class Encoders:
    """The frozen VAE and text encoder, loaded plainly (never sharded), used before training and then dropped."""

    def __init__(self, cfg: Config, folder: Path, device: torch.device, dtype: torch.dtype):
        self.cfg, self.device = cfg, device
        self.vae = load_vae(folder, device, torch.float32)
        text_encoder = Qwen3ForCausalLM.from_pretrained(folder / "text_encoder", dtype=dtype).to(device).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        self.pipeline = Flux2KleinPipeline(
            scheduler=None, vae=self.vae, text_encoder=text_encoder, tokenizer=tokenizer, transformer=None
        )

    def shape(self, item: cache.Item) -> tuple[Hashable, int]:
        """Of a row at its bucket (width, height), or a text alone: what a batch has in common, the text's length."""
        references = reference_images.shapes([item[0]]) if item[1] else None
        return (item[1], str(references)), len(encoding.text_of(item))

    def read(self, item: cache.Item) -> dict[str, Tensor]:
        """pixels (3, H, W) in [-1, 1] of a row, reference_0 (3, h, w) and so on as the pipeline prepares them."""
        (row, bucket), folder = item, self.cfg.data.train_data_dir
        pixels = {"pixels": encoding.read_pixels(row, folder, bucket)} if bucket else {}
        for index, image in enumerate(reference_images.of_row(row, folder) if bucket else ()):
            pixels[f"reference_{index}"] = reference_images.pixels(image, self.pipeline.image_processor)
        return pixels

    def encode(self, items: list[cache.Item], read: dict[str, Tensor]) -> dict[str, Sequence[Tensor]]:
        """prompt_embeds (B, L, D), latents (B, 128, H/16, W/16) of pixels (B, 3, H, W), and of references as many."""
        encoded = {"prompt_embeds": self.prompts([encoding.text_of(item) for item in items])}
        encoded |= self.images(read.pop("pixels"), self.cfg.flow.cache_moments) if read else {}
        return encoded | {name: self.images(pixels, moments=False)["latents"] for name, pixels in read.items()}

    @torch.no_grad()
    def prompts(self, texts: list[str]) -> Tensor:
        """(B, L, D): three layers' hidden states side by side, of texts in the pipeline's own chat template. L is
        always max_sequence_length: the transformer sees the padding, it has no mask."""
        length = self.cfg.max_sequence_length
        return self.pipeline.encode_prompt(texts, device=self.device, max_sequence_length=length)[0]

    @torch.no_grad()
    def images(self, pixels: Tensor, moments: bool) -> dict[str, Tensor]:
        """pixels (B, 3, H, W) in [-1, 1] -> latents (B, 128, H/16, W/16), 2 x 2 patches normalised per channel; with
        moments also the posterior's std."""
        posterior = self.vae.encode(pixels.to(self.device)).latent_dist  # of (B, 32, H/8, W/8)
        mean, std = latent_statistics(self.vae)
        encoded = {"latents": (patchify(posterior.mode()) - mean) / std}
        return encoded | ({"posterior_std": patchify(posterior.std) / std} if moments else {})


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


def encode(cfg: Config, run: Run, folder: Path, embeddings: EmbeddingCache, items: dict[str, cache.Item]) -> None:
    """Add what the encoders make of each row at its bucket (width, height) and of its references, or of a text
    alone."""
    encoders = Encoders(cfg, folder, run.device, run.compute_dtype)
    encoding.encode_items(run, embeddings, items, encoders, cfg.pictures)


# ---------------------------------------------------------------- data


def prepare_data(cfg: Config, run: Run, folder: Path) -> loader.Data:
    """Check every row, choose its bucket, encode what is not in the cache yet."""
    embeddings = cache.open_cache(
        run,
        cfg.pictures.cache_dir,
        cfg.run.output_dir,
        folder,
        ("vae", "text_encoder", "tokenizer"),
        max_sequence_length=cfg.max_sequence_length,
        reference_pixels=reference_images.MAX_PIXELS,
        latents="moments" if cfg.flow.cache_moments else "mode",
        precision=cfg.precision.mixed_precision,
    )
    checks = {"source_problem": reference_images.problem, "file_columns": cfg.flow.mask_columns}
    train, held_out = check.load_records(cfg, run, embeddings.known_good(), **checks)
    usual_file = Path(cfg.data.train_data_dir) / "validation_prompts.txt"
    prompts = folders.read_prompts(cfg.prompts.validation_prompts, usual_file)
    shown = reference_images.shown(prompts, cfg.validation_image_paths, held_out[:4], cfg.data.train_data_dir)
    prompts, shapes = [text for text, _ in shown], reference_images.shapes(train)
    encode_missing = partial(encode, cfg, run, folder, embeddings)
    data = loader.encoded_rows(run, cfg, embeddings, (train, held_out), prompts, encode_missing, shapes)
    data.shown = [(text, embeddings[embeddings.key(text)]["prompt_embeds"], references) for text, references in shown]
    return data


def random_sample(cfg: Config, transformer: dict, rng: torch.Generator) -> dict[str, Tensor]:
    """What one encoded row looks like at full size; transformer: its config. The benchmark's data."""
    side, tokens = cfg.buckets.resolution // 16, cfg.benchmark_prompt_tokens
    return {
        "latents": torch.randn(transformer["in_channels"], side, side, generator=rng),
        "prompt_embeds": torch.randn(tokens, transformer["joint_attention_dim"], generator=rng, dtype=torch.bfloat16),
    }


# ---------------------------------------------------------------- model


@dataclass
class Models:
    """What compute_loss and validate call, and what they need of it."""

    transformer: torch.nn.Module  # as the strategy wraps it; call this one
    config: dict  # of the transformer
    scheduler_config: dict
    empty_prompt_embeds: Tensor  # (L, D) of "", for caption dropout and guidance
    dtype: torch.dtype  # what the transformer computes in
    ema: Ema | None = None
    vae: AutoencoderKLFlux2 | None = None  # for validation's pictures


def refuse_distilled(cfg: Config, folder: Path) -> None:
    """ValueError for a step-distilled checkpoint: flow matching on data would undo its distillation."""
    index = folder / "model_index.json"
    if not cfg.allow_distilled and index.is_file() and json.loads(index.read_text()).get("is_distilled"):
        raise ValueError(
            f"{cfg.pretrained_model_name_or_path} is step-distilled: trained on data it loses its few-step sampling; "
            "take the base model (black-forest-labs/FLUX.2-klein-base-9B or -4B), or insist with --allow_distilled"
        )


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
        torch.cartesian_prod(torch.tensor([10 * index]), *map(torch.arange, (*each.shape[-2:], 1)))
        for index, each in enumerate(latents)
    ]
    return torch.cat(ids)[None].to(device)


def text_ids(prompt_embeds: Tensor) -> Tensor:
    """(1, L, 4) positions (0, 0, 0, l) of the prompt's tokens."""
    length = torch.arange(prompt_embeds.shape[1])
    return torch.cartesian_prod(*[torch.arange(1)] * 3, length)[None].to(prompt_embeds.device)


def predict_velocity(models: Models, noisy_latents: Tensor, sigma: Tensor, batch: dict) -> Tensor:
    """Call the transformer as the pipeline does: noisy_latents (B, 128, H, W), sigma (B,), the batch's prompt_embeds
    (B, L, D) and references (B, 128, h, w) -> packed velocity_pred (B, S, 128) of the target's tokens alone."""
    batch_size, device = len(noisy_latents), noisy_latents.device
    seen = [noisy_latents, *(reference.to(device) for reference in reference_images.of_batch(batch))]
    packed_latents = torch.cat([pack_latents(each) for each in seen], dim=1)  # (B, S + references, 128)
    prompt_embeds = batch["prompt_embeds"].to(device, models.dtype)
    velocity_pred = models.transformer(
        hidden_states=packed_latents.to(models.dtype),
        timestep=(sigma * 1000).to(models.dtype) / 1000,  # (B,), rounded as the pipeline rounds its timesteps
        guidance=None,
        encoder_hidden_states=prompt_embeds,  # (B, L, D)
        txt_ids=text_ids(prompt_embeds).expand(batch_size, -1, -1),  # (B, L, 4)
        img_ids=image_ids(seen, device).expand(batch_size, -1, -1),  # (B, S + references, 4)
        joint_attention_kwargs=None,
        return_dict=False,
    )[0]
    return velocity_pred[:, : noisy_latents.shape[-2] * noisy_latents.shape[-1]]


def sigma_shift(cfg: Config, scheduler_config: dict, image_tokens: int) -> float:
    """How far shift_rule moves sigma towards noise for a picture of so many tokens (references do not count)."""
    if cfg.shift_rule == "empirical":
        return math.exp(compute_empirical_mu(image_tokens, cfg.drawing.num_inference_steps))
    return fm.checkpoint_shift(image_tokens, scheduler_config)


def sample_errors(models: Models, batch: dict, latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """(B,) what is minimised, of each sample: latents and noise (B, 128, H/16, W/16), sigma (B,). Training and the
    held-out loss both call it."""
    velocity_pred = predict_velocity(models, fm.add_noise(latents, noise, sigma), sigma, batch)
    target, weights = fm.velocity_target(latents, noise), fm.error_weights(batch, latents)
    return fm.squared_errors(velocity_pred, pack_latents(target), pack_latents(weights))  # of (B, S, 128)


def compute_loss(models: Models, batch: dict, cfg: Config) -> tuple[Tensor, dict]:
    """One micro-batch's loss, and what the meter adds up.

    Noise, sigma and dropout depend on (seed, step, position) alone.
    """
    device = models.empty_prompt_embeds.device
    rngs = fm.sample_rngs(cfg.run.seed, batch["step"], batch["positions"])
    uniform, dropout = fm.draw_uniform(rngs), fm.draw_uniform(rngs)  # (B,), (B,)
    latents = batch["latents"].to(device)  # (B, 128, H/16, W/16) float32
    noise = fm.draw_normal(rngs, latents.shape[1:]).to(device)  # (B, 128, H/16, W/16)
    if "posterior_std" in batch:
        latents = latents + batch["posterior_std"].to(device) * fm.draw_normal(rngs, latents.shape[1:]).to(device)
    dropped = (dropout < cfg.pictures.caption_dropout).to(device)[:, None, None]
    prompt_embeds = torch.where(dropped, models.empty_prompt_embeds, batch["prompt_embeds"].to(device))  # (B, L, D)
    target_tokens = latents.shape[-2] * latents.shape[-1]
    shift = sigma_shift(cfg, models.scheduler_config, target_tokens)
    sigma = fm.draw_sigmas(uniform, cfg.flow, shift).to(device)  # (B,)

    errors = sample_errors(models, {**batch, "prompt_embeds": prompt_embeds}, latents, noise, sigma)  # (B,)
    loss = (fm.loss_weights(sigma, cfg.flow.loss_weighting) * errors).mean()
    image_tokens = target_tokens + sum(each.shape[-2] * each.shape[-1] for each in reference_images.of_batch(batch))
    flops = len(latents) * forward_flops(models.config, image_tokens, prompt_embeds.shape[1])
    return loss, metrics.of_latents(latents) | {"forward_flops": flops}


def trial(cfg: Config, run: Run, transformer: torch.nn.Module, batch: dict) -> list[Tensor]:
    """The loss of a batch on a transformer without memory: what plan adds up."""
    empty, scheduler = batch["prompt_embeds"][0].to("meta"), folders.part_config(RECIPE / "full_size" / "scheduler")
    models = Models(transformer, loading.config_of(transformer), scheduler, empty, run.compute_dtype)
    return [compute_loss(models, batch, cfg)[0]]


# ---------------------------------------------------------------- validation


@torch.no_grad()
def validate(run: Run, cfg: Config, models: Models, data: loader.Data, step: int) -> None:
    """Pictures by the unmodified pipeline and the held-out loss, with averaged weights where they are kept.

    Every process calls it, and run.in_step gives each as many forwards: sharded weights are gathered inside forward.
    """
    with evaluating(models.transformer, models.ema):
        loss = run.mean_of(held_out_errors(run, cfg, models, data))
        draw_pictures(run, cfg, models, data, pictures.step_folder(cfg.run.output_dir, step))
    metrics.log_validation(run, cfg, step, loss)


def held_out_errors(run: Run, cfg: Config, models: Models, data: loader.Data) -> list[Tensor]:
    """Errors of this process's held-out rows at fixed sigmas, the same noise every time."""
    errors = []
    for index, row, counts in run.in_step(data.held_out):
        batch = {**loader.collate([row]), "positions": [index]}
        found = fm.errors_by_sigma(sample_errors, models, batch, cfg.run.seed, run.device)
        errors += [error.mean() for error in found.values()] * counts
    return errors


def draw_pictures(run: Run, cfg: Config, models: Models, data: loader.Data, folder: Path) -> None:
    """The unmodified pipeline around the model as the strategy wraps it: pictures, captions, references and grid.png
    in folder."""
    pipeline = Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler.from_config(models.scheduler_config),
        vae=models.vae,
        text_encoder=None,
        tokenizer=None,
        transformer=run.unwrap(models.transformer),
    )
    pipeline.set_progress_bar_config(disable=True)
    empty = models.empty_prompt_embeds[None].to(run.device, models.dtype)  # (1, L, D)

    def in_vae_dtype(pipeline: Flux2KleinPipeline, step: int, timestep: Tensor, tensors: dict) -> dict:
        """Autocast (fp32 weights, bf16 compute) returns float32, and this pipeline decodes without a cast."""
        return {"latents": tensors["latents"].to(models.dtype)}

    for index, (text, prompt_embeds, references), counts in run.in_step(data.shown):
        image = pipeline(
            image=references or None,
            prompt_embeds=prompt_embeds[None].to(run.device, models.dtype),  # (1, L, D)
            negative_prompt_embeds=empty,
            guidance_scale=cfg.drawing.guidance_scale,
            width=cfg.buckets.resolution,
            height=cfg.buckets.resolution,
            num_inference_steps=cfg.drawing.num_inference_steps,
            generator=torch.Generator().manual_seed(cfg.run.seed + index),
            callback_on_step_end=in_vae_dtype,
        ).images[0]
        if counts:
            resized = [reference.resize(reference_images.encoded_size(*reference.size)) for reference in references]
            beside = {f"source_{number}": reference for number, reference in enumerate(resized)}
            pictures.save_picture(folder, index, text, image, **beside)
    pictures.save_grid(run, folder, [text for text, *_ in data.shown])


# ---------------------------------------------------------------- main


def main(argv: list[str] | None = None) -> None:
    cfg = config.parse_recipe(Config, argv)
    run = launch.set_up(cfg, RECIPE, argv)  # processes, strategy, output folder, the checkpoint to go on from

    folder = folders.model_folder(cfg, run, PARTS, RECIPE / "full_size")
    refuse_distilled(cfg, folder)
    weights = folders.weights_folder(cfg.tuning.transformer_path, folder)
    transformer = loading.empty_model(Flux2Transformer2DModel, folders.part_config(weights))
    adapters.add(run, cfg, transformer)  # with --lora_rank
    model_config = loading.config_of(transformer)
    plan.check_size(run, cfg, transformer, model_config, random_sample, trial)  # said before hours of encoding
    data = loader.random_data(cfg, model_config, random_sample) if run.benchmark else prepare_data(cfg, run, folder)
    cfg.batch.max_train_steps = cfg.batch.steps_for(len(data), run.world_size)

    transformer = adapters.load(run, cfg, transformer, weights)  # shard by shard; checkpointed, compiled
    optimizer = optimizers.build_optimizer(run, transformer, cfg.tuning.optimizer, cfg.optim)
    model, optimizer = launch.prepare(run, transformer, optimizer, cfg.tuning.gradient_release)
    models = Models(
        transformer=model,
        config=model_config,
        scheduler_config=folders.part_config(folder / "scheduler"),
        empty_prompt_embeds=data.empty_prompt["prompt_embeds"].to(run.device),
        dtype=run.compute_dtype,
        ema=Ema.of(transformer, cfg.tuning.ema_decay),
        vae=load_vae(folder, run.device, run.compute_dtype) if run.validates else None,
    )
    state = checkpoint.resume(run, cfg, model, optimizer, models.ema, data.digest, models.config)
    sampler = loader.make_sampler(data, cfg.batch, run, cfg.run.seed, state.segments, state.step)
    if cfg.run.dry_run:
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        return dry_run.show_captioned(run, cfg, data, sampler, models, sample_errors, Flux2KleinPipeline, tokenizer)
    meter = metrics.start(run, cfg, state)  # the old run's files go now, when nothing can fail any more
    batches = meter.watch(loader.make_loader(data.dataset, sampler, cfg.data.dataloader_num_workers, cfg.run.seed))
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
        export.export_trained(run, cfg, model, models.ema, models.config)
        metrics.print_next_steps(run, cfg, metrics.LOOK_AT, NEXT_STEPS)
    run.end()


if __name__ == "__main__":
    with plan.explained_errors():
        main()
