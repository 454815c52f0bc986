"""Full-parameter fine-tuning of Qwen-Image (QwenImageTransformer2DModel), from 2 GPUs to one 80 GB card. Read it top
to bottom.

    bash run.sh                                           the tiny model and drawn data, on any machine
    bash run.sh full --train_data_dir /data/mine          the real model, on the machine that configs/full.yaml names

Order: Config, encoding, data, model, loss, validation, main with the loop. The settings that all recipes share are in
common/settings.py.
"""

import sys
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

RECIPE = Path(__file__).resolve().parent
sys.path[:0] = [str(RECIPE), str(next(folder for folder in RECIPE.parents if (folder / "common").is_dir()))]

import common.quiet  # noqa: F401, isort: skip
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from torch import Tensor
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

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

    pretrained_model_name_or_path: str = "Qwen/Qwen-Image-2512"
    """local folder or a hub name; "tiny" is the embedded model that make_tiny.py builds"""
    max_sequence_length: int = 512
    """prompt tokens kept, as the pipeline's default"""
    benchmark_prompt_tokens: int = 256
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
        rules.between(self, 1, 1024, "max_sequence_length", "benchmark_prompt_tokens")


# ---------------------------------------------------------------- encoding: what a row becomes, before training


class Encoders:
    """The frozen VAE and text encoder, loaded plainly (never sharded), used before training and then dropped."""

    def __init__(self, cfg: Config, folder: Path, device: torch.device, dtype: torch.dtype):
        self.cfg, self.device = cfg, device
        self.vae = load_vae(folder, device, torch.float32)
        text_encoder = (
            Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "text_encoder", dtype=dtype).to(device).eval()
        )
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        self.pipeline = QwenImagePipeline(
            scheduler=None, vae=self.vae, text_encoder=text_encoder, tokenizer=tokenizer, transformer=None
        )

    def shape(self, item: cache.Item) -> tuple[Hashable, int]:
        """Of a row at its bucket (width, height), or a text alone: what a batch has in common, the text's length."""
        return item[1], len(encoding.text_of(item))

    def read(self, item: cache.Item) -> dict[str, Tensor]:
        """pixels (3, H, W) in [-1, 1] of a row."""
        row, bucket = item
        return {"pixels": encoding.read_pixels(row, self.cfg.data.train_data_dir, bucket)} if bucket else {}

    def encode(self, items: list[cache.Item], read: dict[str, Tensor]) -> dict[str, Sequence[Tensor]]:
        """prompt_embeds, B times (L, D), and latents (B, 16, 1, H/8, W/8) of pixels (B, 3, H, W)."""
        prompts = {"prompt_embeds": self.prompts([encoding.text_of(item) for item in items])}
        return prompts | (self.images(read["pixels"], self.cfg.flow.cache_moments) if read else {})

    @torch.no_grad()
    def prompts(self, texts: list[str]) -> list[Tensor]:
        """B times (L, D): the pipeline's own template and encoding, its 34 template tokens dropped, unpadded."""
        prompt_embeds, mask = self.pipeline.encode_prompt(
            texts, device=self.device, max_sequence_length=self.cfg.max_sequence_length
        )
        lengths = [prompt_embeds.shape[1]] * len(texts) if mask is None else mask.sum(1).tolist()
        return [embeds[:length] for embeds, length in zip(prompt_embeds, lengths, strict=True)]

    @torch.no_grad()
    def images(self, pixels: Tensor, moments: bool) -> dict[str, Tensor]:
        """pixels (B, 3, H, W) in [-1, 1] -> latents (B, 16, 1, H/8, W/8), normalised per channel; with moments also
        the posterior's std."""
        posterior = self.vae.encode(pixels[:, :, None].to(self.device)).latent_dist  # of (B, 16, 1, H/8, W/8)
        mean, std = latent_statistics(self.vae)
        encoded = {"latents": (posterior.mode() - mean) / std}
        return encoded | ({"posterior_std": posterior.std / std} if moments else {})


def load_vae(folder: Path, device: torch.device, dtype: torch.dtype) -> AutoencoderKLQwenImage:
    return AutoencoderKLQwenImage.from_pretrained(folder / "vae", dtype=dtype).to(device).eval().requires_grad_(False)


def latent_statistics(vae: AutoencoderKLQwenImage) -> tuple[Tensor, Tensor]:
    """(latents_mean, latents_std), each (1, 16, 1, 1, 1): normalised latents are (latents - mean) / std."""
    mean, std = (
        torch.tensor(values, device=vae.device, dtype=vae.dtype).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, std


def encode(cfg: Config, run: Run, folder: Path, embeddings: EmbeddingCache, items: dict[str, cache.Item]) -> None:
    """Add what the encoders make of each row at its bucket (width, height), or of a text alone."""
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
        template=QwenImagePipeline(None, None, None, None, None).prompt_template_encode,
        max_sequence_length=cfg.max_sequence_length,
        latents="moments" if cfg.flow.cache_moments else "mode",
        precision=cfg.precision.mixed_precision,
    )
    train, held_out = check.load_records(cfg, run, embeddings.known_good(), file_columns=cfg.flow.mask_columns)
    usual_file = Path(cfg.data.train_data_dir) / "validation_prompts.txt"
    prompts = folders.read_prompts(cfg.prompts.validation_prompts, usual_file) or [row.text for row in held_out[:4]]
    encode_missing = partial(encode, cfg, run, folder, embeddings)
    data = loader.encoded_rows(run, cfg, embeddings, (train, held_out), prompts, encode_missing)
    data.shown = [(text, embeddings[embeddings.key(text)]["prompt_embeds"]) for text in prompts]
    return data


def random_sample(cfg: Config, transformer: dict, rng: torch.Generator) -> dict[str, Tensor]:
    """What one encoded row looks like at full size; transformer: its config. The benchmark's data."""
    side = cfg.buckets.resolution // 8
    return {
        "latents": torch.randn(16, 1, side, side, generator=rng),
        "prompt_embeds": torch.randn(cfg.benchmark_prompt_tokens, transformer["joint_attention_dim"], generator=rng),
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
    vae: AutoencoderKLQwenImage | None = None  # for validation's pictures


def forward_flops(config: dict, image_tokens: int, prompt_tokens: int) -> float:
    """FLOPs of one sample's forward (matrix products and attention, 2 a multiply-add); 73.1e12 at 1024 x 1024 with 256
    prompt tokens."""
    width, layers = config["num_attention_heads"] * config["attention_head_dim"], config["num_layers"]
    tokens = image_tokens + prompt_tokens
    block = 24 * tokens * width**2 + 4 * tokens**2 * width + 24 * width**2
    ends = 2 * config["in_channels"] * image_tokens + config["joint_attention_dim"] * prompt_tokens + 256 + 3 * width
    return layers * block + 2 * width * ends


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
    mask = torch.tensor([[1] * len(prompt) + [0] * (longest - len(prompt)) for prompt in prompts])
    return prompt_embeds, None if mask.all() else mask.to(prompt_embeds.device)


def predict_velocity(models: Models, noisy_latents: Tensor, sigma: Tensor, prompts: list[Tensor]) -> Tensor:
    """Call the transformer as the pipeline does: noisy_latents (B, 16, 1, H, W), sigma (B,) -> packed velocity_pred
    (B, S, 64)."""
    prompt_embeds, prompt_embeds_mask = pad_prompts(
        [prompt.to(noisy_latents.device, models.dtype) for prompt in prompts]
    )
    height, width = noisy_latents.shape[-2:]
    return models.transformer(
        hidden_states=pack_latents(noisy_latents).to(models.dtype),  # (B, S, 64)
        timestep=(sigma * 1000).to(models.dtype) / 1000,  # (B,), rounded as the pipeline rounds its timesteps
        guidance=None,
        encoder_hidden_states_mask=prompt_embeds_mask,  # (B, L) or None
        encoder_hidden_states=prompt_embeds,  # (B, L, D)
        img_shapes=[[(1, height // 2, width // 2)]] * len(noisy_latents),
        attention_kwargs={},
        return_dict=False,
    )[0]


def sample_errors(models: Models, batch: dict, latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """(B,) what is minimised, of each sample: latents and noise (B, 16, 1, H/8, W/8), sigma (B,). Training and the
    held-out loss both call it."""
    velocity_pred = predict_velocity(models, fm.add_noise(latents, noise, sigma), sigma, batch["prompt_embeds"])
    target, weights = fm.velocity_target(latents, noise), fm.error_weights(batch, latents)
    return fm.squared_errors(velocity_pred, pack_latents(target), pack_latents(weights))  # of (B, S, 64)


def compute_loss(models: Models, batch: dict, cfg: Config) -> tuple[Tensor, dict]:
    """One micro-batch's loss, and what the meter adds up.

    Noise, sigma and dropout depend on (seed, step, position) alone.
    """
    device = models.empty_prompt_embeds.device
    rngs = fm.sample_rngs(cfg.run.seed, batch["step"], batch["positions"])
    uniform, dropout = fm.draw_uniform(rngs), fm.draw_uniform(rngs)  # (B,), (B,)
    latents = batch["latents"].to(device)  # (B, 16, 1, H/8, W/8) float32
    noise = fm.draw_normal(rngs, latents.shape[1:]).to(device)  # (B, 16, 1, H/8, W/8)
    if "posterior_std" in batch:
        latents = latents + batch["posterior_std"].to(device) * fm.draw_normal(rngs, latents.shape[1:]).to(device)
    prompts = [
        models.empty_prompt_embeds if drop < cfg.pictures.caption_dropout else embeds
        for drop, embeds in zip(dropout, batch["prompt_embeds"], strict=True)
    ]
    image_tokens = latents.shape[-2] * latents.shape[-1] // 4
    shift = fm.checkpoint_shift(image_tokens, models.scheduler_config)
    sigma = fm.draw_sigmas(uniform, cfg.flow, shift).to(device)  # (B,)

    errors = sample_errors(models, {**batch, "prompt_embeds": prompts}, latents, noise, sigma)  # (B,)
    loss = (fm.loss_weights(sigma, cfg.flow.loss_weighting) * errors).mean()
    flops = len(latents) * forward_flops(models.config, image_tokens, max(map(len, prompts)))
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
    """The unmodified pipeline around the model as the strategy wraps it: pictures, captions and grid.png in folder."""
    pipeline = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler.from_config(models.scheduler_config),
        vae=models.vae,
        text_encoder=None,
        tokenizer=None,
        transformer=run.unwrap(models.transformer),
    )
    pipeline.set_progress_bar_config(disable=True)
    empty = models.empty_prompt_embeds[None].to(run.device, models.dtype)  # (1, L, D)
    for index, (text, prompt_embeds), counts in run.in_step(data.shown):
        prompt_embeds = prompt_embeds[None].to(run.device, models.dtype)  # (1, L, D)
        image = pipeline(
            prompt_embeds=prompt_embeds,
            prompt_embeds_mask=torch.ones(prompt_embeds.shape[:2], dtype=torch.long, device=run.device),
            negative_prompt_embeds=empty,
            negative_prompt_embeds_mask=torch.ones(empty.shape[:2], dtype=torch.long, device=run.device),
            true_cfg_scale=cfg.drawing.guidance_scale,
            width=cfg.buckets.resolution,
            height=cfg.buckets.resolution,
            num_inference_steps=cfg.drawing.num_inference_steps,
            generator=torch.Generator().manual_seed(cfg.run.seed + index),
        ).images[0]
        if counts:
            pictures.save_picture(folder, index, text, image)
    pictures.save_grid(run, folder, [text for text, _ in data.shown])


# ---------------------------------------------------------------- main


def main(argv: list[str] | None = None) -> None:
    cfg = config.parse_recipe(Config, argv)
    run = launch.set_up(cfg, RECIPE, argv)  # processes, strategy, output folder, the checkpoint to go on from

    folder = folders.model_folder(cfg, run, PARTS, RECIPE / "full_size")
    weights = folders.weights_folder(cfg.tuning.transformer_path, folder)
    transformer = loading.empty_model(QwenImageTransformer2DModel, folders.part_config(weights))
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
        return dry_run.show_captioned(run, cfg, data, sampler, models, sample_errors, QwenImagePipeline, tokenizer)
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
