"""Full-parameter fine-tuning of Qwen-Image 2.1 (QwenImage21Transformer2DModel): pictures with captions, and edits of
source pictures, in one manifest. Read it top to bottom.

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
import source_images
import torch
from accelerate.utils import send_to_device
from diffusers import QwenImage21Pipeline, QwenImage21Transformer2DModel
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad
from transformers import AutoProcessor, Qwen3VLForConditionalGeneration

from common import image_settings, rules, settings
from common.data import cache, check, encoding, images, loader, manifest
from common.data.cache import EmbeddingCache
from common.model import adapters, export, loading
from common.model.ema import Ema, evaluating
from common.processes import Run
from common.record import checkpoint, metrics, pictures
from common.start import config, dry_run, folders, launch, plan
from common.step import flow_matching as fm
from common.step import optimizers, steps

PARTS = ("transformer", "vae", "text_encoder", "processor", "scheduler")
NEXT_STEPS = {"draw from the result": 'sample.py --run {run} --prompt "..."'}


@dataclass
class Config:
    """This recipe's settings: its own, and the groups of common/settings.py. All flags are flat."""

    pretrained_model_name_or_path: str = "Qwen/Qwen-Image-2.1"
    """local folder or a hub name; "tiny" is the embedded model that make_tiny.py builds"""
    benchmark_prompt_tokens: int = 256
    """prompt length of the benchmark"""
    benchmark_sources: int = 0
    """source images of the benchmark"""

    run: settings.Flat[settings.Run] = field(default_factory=settings.Run)
    data: settings.Flat[settings.Data] = field(default_factory=settings.Data)
    pictures: settings.Flat[image_settings.Pictures] = field(default_factory=image_settings.Pictures)
    buckets: settings.Flat[image_settings.Buckets] = field(
        default_factory=partial(image_settings.Buckets, bucket_multiple=32)
    )
    batch: settings.Flat[settings.Batch] = field(default_factory=settings.Batch)
    precision: settings.Flat[settings.Precision] = field(default_factory=settings.Precision)
    speed: settings.Flat[settings.Speed] = field(default_factory=settings.Speed)
    tuning: settings.Flat[settings.FullTuning] = field(default_factory=settings.FullTuning)
    lora: settings.Flat[settings.Lora] = field(default_factory=settings.Lora)
    optim: settings.Flat[settings.Optim] = field(default_factory=settings.Optim)
    flow: settings.Flat[image_settings.FlowMatching] = field(default_factory=image_settings.FlowMatching)
    validation: settings.Flat[settings.Validation] = field(default_factory=settings.Validation)
    drawing: settings.Flat[image_settings.Drawing] = field(
        default_factory=partial(image_settings.Drawing, num_inference_steps=40, guidance_scale=1.0)  # the pipeline's
    )
    prompts: settings.Flat[image_settings.Prompts] = field(default_factory=image_settings.Prompts)

    def check(self) -> None:
        rules.between(self, 1, 1024, "benchmark_prompt_tokens")
        rules.between(self, 0, 16, "benchmark_sources")
        rules.multiple_of(self.buckets, "bucket_multiple", 32, "VAE 16 x the text encoder's squares of 2 x 2 tokens")


# ---------------------------------------------------------------- encoding: what a row becomes, before training


class Encoders:
    """The frozen VAE and text encoder, loaded plainly (never sharded), used before training and then dropped."""

    def __init__(self, cfg: Config, folder: Path, device: torch.device, dtype: torch.dtype):
        self.cfg, self.device = cfg, device
        text_encoder = (
            Qwen3VLForConditionalGeneration.from_pretrained(folder / "text_encoder", dtype=dtype).to(device).eval()
        )
        self.pipeline = load_pipeline(folder, device, torch.float32, text_encoder=text_encoder)
        self.vae = self.pipeline.vae

    def shape(self, item: cache.Item) -> tuple[Hashable, int]:
        """Of a row at its bucket (width, height), or a text alone: what a batch has in common, the text's length."""
        sizes = source_images.shapes([item[0]], self.cfg.buckets.resolution) if item[1] else None
        return (item[1], str(sizes)), len(encoding.text_of(item))

    def read(self, item: cache.Item) -> dict:
        """pixels (4, H, W) in [-1, 1] of a row, its sources, and as pixels source_0 (4, h, w) and so on."""
        (row, bucket), folder = item, self.cfg.data.train_data_dir
        if not bucket:
            return {}
        image = manifest.load_image(row, folder, at_least=bucket, keep_alpha=True).convert("RGBA")
        pixels = {"pixels": images.image_to_tensor(images.resize_and_crop(image, bucket))}
        return pixels | source_images.read(row, folder, self.cfg.buckets.resolution)

    def encode(self, items: list[cache.Item], read: dict) -> dict[str, Sequence[Tensor]]:
        """What prompt gives, text by text (padding changes the last bits), and latents of pixels and of sources."""
        sources = read.pop("sources", [[]] * len(items))
        each = [self.prompt(encoding.text_of(item), of_row) for item, of_row in zip(items, sources, strict=True)]
        encoded: dict[str, Sequence[Tensor]] = {name: [one[name] for one in each] for name in each[0]}
        if sources[0]:
            encoded["empty_prompt_embeds"] = [self.prompt("", of_row)["prompt_embeds"] for of_row in sources]
        encoded |= self.images(read.pop("pixels"), self.cfg.flow.cache_moments) if read else {}
        return encoded | {name: self.images(pixels, moments=False)["latents"] for name, pixels in read.items()}

    @torch.no_grad()
    def prompt(self, text: str, sources: list[Image.Image]) -> dict[str, Tensor]:
        """prompt_embeds (L, D), image_pad_mask (L,), True where an image's tokens stand: the pipeline's own template
        and encoding of a text with its sources (RGBA, as the VAE sees them), its system turn dropped, unpadded."""
        embeds, _, image_pad_mask = self.pipeline.encode_prompt([text], image=sources or None, device=self.device)
        return {"prompt_embeds": embeds[0].cpu(), "image_pad_mask": image_pad_mask[0].cpu()}

    @torch.no_grad()
    def images(self, pixels: Tensor, moments: bool) -> dict[str, Tensor]:
        """pixels (B, 4, H, W) in [-1, 1] -> latents (B, 64, 1, H/16, W/16), normalised per channel; with moments also
        the posterior's std."""
        posterior = self.vae.encode(pixels[:, :, None].to(self.device)).latent_dist  # of (B, 64, 1, H/16, W/16)
        mean, std = latent_statistics(self.vae)
        encoded = {"latents": (posterior.mode() - mean) / std}
        return encoded | ({"posterior_std": posterior.std / std} if moments else {})


def load_pipeline(folder: Path, device: torch.device, dtype: torch.dtype, **parts: object) -> QwenImage21Pipeline:
    """The unmodified pipeline without its transformer, and without text encoder where none is among the parts."""
    parts = {"transformer": None, "text_encoder": None, **parts}
    pipeline = QwenImage21Pipeline.from_pretrained(folder, dtype=dtype, **parts)
    pipeline.vae.to(device).eval().requires_grad_(False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def latent_statistics(vae: torch.nn.Module) -> tuple[Tensor, Tensor]:
    """(latents_mean, latents_std), each (1, 64, 1, 1, 1): normalised latents are (latents - mean) / std."""
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
    processor = AutoProcessor.from_pretrained(folder / "processor")
    pipeline = QwenImage21Pipeline(None, None, None, processor, None)
    embeddings = cache.open_cache(
        run,
        cfg.pictures.cache_dir,
        cfg.run.output_dir,
        folder,
        ("vae", "text_encoder", "processor"),
        template=[pipeline.prompt_template_t2i, pipeline.prompt_template_ti2i],
        latents="moments" if cfg.flow.cache_moments else "mode",
        precision=cfg.precision.mixed_precision,
        source_resolution=cfg.buckets.resolution,
    )
    checks = {"file_columns": cfg.flow.mask_columns, **source_images.CHECKS}
    train, held_out = check.load_records(cfg, run, embeddings.known_good(), **checks)
    usual_file = Path(cfg.data.train_data_dir) / "validation_prompts.txt"
    prompts = folders.read_prompts(cfg.prompts.validation_prompts, usual_file)
    shapes = source_images.shapes(train, cfg.buckets.resolution)
    encode_missing = partial(encode, cfg, run, folder, embeddings)
    data = loader.encoded_rows(run, cfg, embeddings, (train, held_out), prompts, encode_missing, shapes)
    data.shown = [(text, [], embeddings[embeddings.key(text)]) for text in prompts]
    rows = [each for each in zip(held_out, data.held_out, strict=True) if each[0].source_file_path or not prompts]
    for row, encoded in rows[:4]:
        sources = source_images.of_row(row, cfg.data.train_data_dir, cfg.buckets.resolution)
        data.shown.append((row.text, sources, encoded))
    return data


def random_sample(cfg: Config, transformer: dict, rng: torch.Generator) -> dict[str, Tensor]:
    """What one encoded row looks like at full size; transformer: its config. The benchmark's data."""
    side, slots = cfg.buckets.resolution // 16, (cfg.buckets.resolution // 32) ** 2
    image_pad_mask = torch.tensor([True] * slots * cfg.benchmark_sources + [False] * cfg.benchmark_prompt_tokens)
    prompt_embeds = torch.randn(len(image_pad_mask), transformer["context_in_dim"], generator=rng)
    sample = {"image_pad_mask": image_pad_mask, "prompt_embeds": prompt_embeds}
    sample |= {"empty_prompt_embeds": prompt_embeds} if cfg.benchmark_sources else {}
    names = "latents", *(f"source_{which}" for which in range(cfg.benchmark_sources))
    return sample | {name: torch.randn(64, 1, side, side, generator=rng) for name in names}


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
    pipeline: QwenImage21Pipeline | None = None  # for validation's pictures, without transformer and text encoder


def forward_flops(config: dict, target_tokens: int, source_tokens: int, prompt_tokens: int) -> float:
    """FLOPs of one sample's forward (matrix products and attention, 2 a multiply-add); 70.1e12 at 1024 x 1024
    with 256 prompt tokens and no source. Text and sources see what stands before them, the target sees everything.

    prompt_tokens: as the text encoder counts them, a source's among them: a quarter of its source_tokens.
    """
    width, layers = config["num_attention_heads"] * config["attention_head_dim"], config["num_layers"]
    before = prompt_tokens + source_tokens - source_tokens // 4
    tokens = before + target_tokens
    block = (8 + 6 * config["mlp_ratio"]) * tokens * width**2 + 4 * width * (target_tokens * tokens + before**2 / 2)
    ends = config["in_channels"] * (2 * tokens - before + source_tokens)
    ends += (config["context_in_dim"] + width) * prompt_tokens
    return layers * block + 2 * width * ends


# ---------------------------------------------------------------- loss


def pack_latents(latents: Tensor) -> Tensor:
    """(B, 64, 1, H, W) -> (B, H * W, 64): each latent is a token."""
    return latents.flatten(2).transpose(1, 2)


def pad_prompts(prompts: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """List of (L, D) -> prompt_embeds (B, max L, D) and mask (B, max L), or None when every token is valid, as the
    pipeline passes it."""
    longest = max(len(prompt) for prompt in prompts)
    prompt_embeds = torch.stack([pad(prompt, (0, 0, 0, longest - len(prompt))) for prompt in prompts])
    mask = torch.tensor([[1] * len(prompt) + [0] * (longest - len(prompt)) for prompt in prompts])
    return prompt_embeds, None if mask.all() else mask.to(prompt_embeds.device)


def predict_velocity(models: Models, noisy_latents: Tensor, sigma: Tensor, batch: dict) -> Tensor:
    """Call the transformer as the pipeline does: noisy_latents (B, 64, 1, H, W), sigma (B,); of batch prompt_embeds,
    image_pad_mask and sources -> packed velocity_pred (B, S, 64) of the target's tokens alone."""
    pictures = [
        *(source.to(noisy_latents.device) for source in source_images.of_batch(batch)),
        noisy_latents,
    ]  # the target last
    prompt_embeds, prompt_embeds_mask = pad_prompts(
        [prompt.to(noisy_latents.device, models.dtype) for prompt in batch["prompt_embeds"]]
    )
    n_target = noisy_latents.shape[-2:].numel()
    slots = batch["image_pad_mask"][0]  # (L,): one layout a batch, sources before the text
    slots = pad(slots, (0, prompt_embeds.shape[1] - len(slots)))
    slots = torch.cat([slots, slots.new_ones(n_target // 4)])  # a slot stands for 2 x 2 of the target's latents
    slots = slots if noisy_latents.is_meta else slots.to(noisy_latents.device)  # plan, too, needs to know the layout
    velocity_pred = models.transformer(
        hidden_states=torch.cat(list(map(pack_latents, pictures)), 1).to(models.dtype),  # (B, sources + S, 64)
        timestep=(sigma * 1000).to(models.dtype) / 1000,  # (B,), rounded as the pipeline rounds its timesteps
        encoder_hidden_states=prompt_embeds,  # (B, L, D)
        encoder_hidden_states_mask=prompt_embeds_mask,  # (B, L) or None
        img_shapes=[[(1, *each.shape[-2:]) for each in pictures]] * len(noisy_latents),
        img_mask=slots.expand(len(noisy_latents), -1),  # (B, L + S/4)
        attention_kwargs={},
        kv_cache=None,
        kv_cache_mode=None,
        return_dict=False,
    )[0]
    return velocity_pred[:, -n_target:]


def sample_errors(models: Models, batch: dict, latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """(B,) what is minimised, of each sample: latents and noise (B, 64, 1, H/16, W/16), sigma (B,). Training and the
    held-out loss both call it."""
    velocity_pred = predict_velocity(models, fm.add_noise(latents, noise, sigma), sigma, batch)
    target, weights = fm.velocity_target(latents, noise), fm.error_weights(batch, latents)
    return fm.squared_errors(velocity_pred, pack_latents(target), pack_latents(weights))  # of (B, S, 64)


def compute_loss(models: Models, batch: dict, cfg: Config) -> tuple[Tensor, dict]:
    """One micro-batch's loss, and what the meter adds up.

    Noise, sigma and dropout depend on (seed, step, position) alone.
    """
    device = models.empty_prompt_embeds.device
    rngs = fm.sample_rngs(cfg.run.seed, batch["step"], batch["positions"])
    uniform, dropout = fm.draw_uniform(rngs), fm.draw_uniform(rngs)  # (B,), (B,)
    latents = batch["latents"].to(device)  # (B, 64, 1, H/16, W/16) float32
    noise = fm.draw_normal(rngs, latents.shape[1:]).to(device)  # (B, 64, 1, H/16, W/16)
    if "posterior_std" in batch:
        latents = latents + batch["posterior_std"].to(device) * fm.draw_normal(rngs, latents.shape[1:]).to(device)
    empty = batch.get("empty_prompt_embeds", [models.empty_prompt_embeds] * len(latents))
    prompts = [
        empty_embeds if drop < cfg.pictures.caption_dropout else embeds
        for drop, embeds, empty_embeds in zip(dropout, batch["prompt_embeds"], empty, strict=True)
    ]
    image_tokens = latents.shape[-2:].numel()
    shift = fm.checkpoint_shift(image_tokens, models.scheduler_config)
    sigma = fm.draw_sigmas(uniform, cfg.flow, shift).to(device)  # (B,)

    errors = sample_errors(models, {**batch, "prompt_embeds": prompts}, latents, noise, sigma)  # (B,)
    loss = (fm.loss_weights(sigma, cfg.flow.loss_weighting) * errors).mean()
    source_tokens = sum(source.shape[-2:].numel() for source in source_images.of_batch(batch))
    flops = len(latents) * forward_flops(models.config, image_tokens, source_tokens, max(map(len, prompts)))
    return loss, metrics.of_latents(latents) | {"forward_flops": flops}


def trial(cfg: Config, run: Run, transformer: torch.nn.Module, batch: dict) -> list[Tensor]:
    """The loss of a batch on a transformer without memory: what plan adds up."""
    empty, scheduler = batch["prompt_embeds"][0].to("meta"), folders.part_config(RECIPE / "full_size" / "scheduler")
    models = Models(transformer, loading.config_of(transformer), scheduler, empty, run.compute_dtype)
    transformer.txt_in.register_forward_hook(lambda module, args, output: output.detach())  # an index of meta fails
    for module in (*transformer.transformer_blocks, transformer.norm_out):  # they get the shape of the real layout
        module.register_forward_pre_hook(lambda _, *given: send_to_device(given, "meta"), with_kwargs=True)
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
    """The unmodified pipeline around the model as the strategy wraps it: pictures, captions and grid.png in folder.
    Its text encoder is gone, so encode_prompt answers with what it gave before training."""
    pipeline, side = models.pipeline, cfg.buckets.resolution
    pipeline.register_modules(transformer=run.unwrap(models.transformer))
    for index, (text, sources, encoded), counts in run.in_step(data.shown):
        pipeline.encode_prompt = partial(encoded_before, run, models, encoded)
        image = pipeline(
            prompt=text,
            image=sources or None,
            negative_prompt="" if cfg.drawing.guidance_scale > 1 else None,
            true_cfg_scale=cfg.drawing.guidance_scale,
            width=side,
            height=side,
            output_resolution=side,
            num_inference_steps=cfg.drawing.num_inference_steps,
            generator=torch.Generator().manual_seed(cfg.run.seed + index),
        ).images[0]
        if counts:
            beside = {f"source_{which}": source for which, source in enumerate(sources)}
            pictures.save_picture(folder, index, text, image, **beside)
    pictures.save_grid(run, folder, [text for text, _, _ in data.shown])


def encoded_before(run: Run, models: Models, encoded: dict, prompt: str, **_: object) -> tuple[Tensor, None, Tensor]:
    """What the pipeline's encode_prompt gave for a text, or for "": prompt_embeds (1, L, D), image_pad_mask (1, L)."""
    embeds = encoded["prompt_embeds"] if prompt else encoded.get("empty_prompt_embeds", models.empty_prompt_embeds)
    mask = pad(encoded["image_pad_mask"], (0, len(embeds) - len(encoded["image_pad_mask"])))
    return embeds[None].to(run.device, models.dtype), None, mask[None].to(run.device)


# ---------------------------------------------------------------- main


def main(argv: list[str] | None = None) -> None:
    cfg = config.parse_recipe(Config, argv)
    run = launch.set_up(cfg, RECIPE, argv)  # processes, strategy, output folder, the checkpoint to go on from

    folder = folders.model_folder(cfg, run, PARTS, RECIPE / "full_size")
    weights = folders.weights_folder(cfg.tuning.transformer_path, folder)
    transformer = loading.empty_model(QwenImage21Transformer2DModel, folders.part_config(weights))
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
        pipeline=load_pipeline(folder, run.device, run.compute_dtype) if run.validates else None,
    )
    state = checkpoint.resume(run, cfg, model, optimizer, models.ema, data.digest, models.config)
    sampler = loader.make_sampler(data, cfg.batch, run, cfg.run.seed, state.segments, state.step)
    if cfg.run.dry_run:
        losses = partial(fm.errors_by_sigma, sample_errors, models, seed=cfg.run.seed, device=run.device)
        sample = partial(source_images.sample_to_look_at, run, cfg, folder, data, cfg.buckets.resolution)
        return dry_run.show(run, cfg, data, sampler, models.transformer, losses, sample)
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
