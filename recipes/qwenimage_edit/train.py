"""Training Qwen-Image-Edit and Qwen-Image-Edit-2509 / 2511 (QwenImageTransformer2DModel): all weights, some modules
or LoRA. Read it top to bottom.

    bash run.sh                                           the tiny model and drawn edits, on any machine
    bash run.sh full --train_data_dir /data/mine          the real model, on the machine that configs/full.yaml names

Order: Config, data, model, loss, validation, main with the loop. Beside it: edits.py (rows, sizes, what validation
shows), encoding.py (latents and prompts, cached), video.py (frames), trained_parts.py (what trains),
from_videox_fun.py (its flags). The settings that all recipes share are in common/settings.py.
"""

import json
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

RECIPE = Path(__file__).resolve().parent
sys.path[:0] = [str(RECIPE), str(next(folder for folder in RECIPE.parents if (folder / "common").is_dir()))]

import common.quiet  # noqa: F401, isort: skip
import edits
import encoding
import from_videox_fun
import torch
import trained_parts
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
from torch import Tensor

from common import image_settings, rules, settings
from common.data import loader, order
from common.model import adapters, export, loading
from common.model.ema import Ema, evaluating
from common.processes import Run, on_main
from common.record import checkpoint, metrics, pictures
from common.record.folder import read_state
from common.start import config, dry_run, folders, launch, plan
from common.step import flow_matching as fm
from common.step import optimizers, steps

PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "processor", "scheduler")
NEXT_STEPS = {"edit with the result": 'sample.py --run {run} --image PICTURE --prompt "..."'}


@dataclass
class Config:
    """This recipe's settings: its own, and the groups of common/settings.py. All flags are flat."""

    pretrained_model_name_or_path: str = "Qwen/Qwen-Image-Edit-2511"
    """local folder or a hub name; "tiny" is the embedded model that make_tiny.py builds"""
    train_mode: Literal["qwen_image_edit", "qwen_image_edit_plus"] = "qwen_image_edit_plus"
    """qwen_image_edit for Qwen-Image-Edit (one source); qwen_image_edit_plus for 2509 and 2511 (one or more)"""
    trainable_modules: tuple[str, ...] = (".",)
    """train the parameters whose names contain one of these: "." is everything, "attn" attention alone"""
    image_sample_size: int = 1024
    """target area is image_sample_size squared; a multiple of 16 (32 rounds sizes as the pipelines do)"""
    enable_bucket: bool = True
    """train whole targets, grouped by resolution; without it targets are cut to a square, which their sources are
    not"""
    random_hw_adapt: bool = False
    """draw the target's size between 512 and image_sample_size, anew for each step"""
    uniform_sampling: bool = False
    """draw sigma, before the shift, in equal strata over the batch and the processes instead (one a sample of the
    step)"""
    validation_epochs: float = 0.0
    """when given, validation_steps (unless that is 0) is at most this many passes over the data; 0 leaves it alone"""
    validation_image_paths: tuple[str, ...] = ()
    """source image of each validation prompt, several of one prompt joined by commas, '' for text alone"""
    benchmark_prompt_tokens: int = 256
    """prompt length of the benchmark"""
    benchmark_sources: int = 1
    """source images of the benchmark"""

    videox_fun: settings.Flat[from_videox_fun.Settings] = field(default_factory=from_videox_fun.Settings)
    run: settings.Flat[settings.Run] = field(default_factory=settings.Run)
    data: settings.Flat[settings.Data] = field(default_factory=settings.Data)
    pictures: settings.Flat[image_settings.Pictures] = field(default_factory=image_settings.Pictures)
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
        rules.multiple_of(self, "image_sample_size", 16, "VAE 8 x packing 2")
        rules.between(self, 16, 8192, "image_sample_size")
        rules.between(self, 1, 4096, "benchmark_prompt_tokens")
        rules.between(self, 0, 64, "benchmark_sources")
        from_videox_fun.apply(self.videox_fun, self.tuning, self.lora, self.flow)
        if self.random_hw_adapt and self.image_sample_size < edits.smallest_side(self):
            raise ValueError(
                f"random_hw_adapt draws sizes from {edits.smallest_side(self)} to image_sample_size, which is "
                f"{self.image_sample_size}; expected at least {edits.smallest_side(self)}"
            )
        low = self.videox_fun.trainable_modules_low_learning_rate
        if self.lora.lora_rank and (*self.trainable_modules, *low) != (".",):
            raise ValueError(
                f"lora_rank {self.lora.lora_rank} trains adapters alone, got trainable_modules "
                f"{' '.join((*self.trainable_modules, *low))} too; drop one of them"
            )
        if not self.lora.lora_rank and (self.videox_fun.target_name or self.videox_fun.lora_skip_name):
            raise ValueError("target_name and lora_skip_name are for LoRA; add --lora_rank 128 --lora_alpha 64, say")
        if self.data.train_data_dir == "":
            self.data.train_data_dir = "/"  # a manifest of absolute paths


# ---------------------------------------------------------------- data


def prepare_data(cfg: Config, run: Run, folder: Path) -> loader.Data:
    """Check every row, choose its size, encode what is not in the cache yet of all that the steps to come will see."""
    warn_of_other_mode(run, cfg, folder)
    embeddings = encoding.open_cache(cfg, run, folder)
    train, held_out = edits.load_rows(cfg, run, token_side(cfg, folder), embeddings.known_good())
    shown = on_main(run, edits.read_shown, cfg, held_out.records)
    if cfg.validation_epochs:
        most = round(cfg.validation_epochs * len(train.records) / cfg.batch.samples_a_step(run.world_size))
        cfg.validation.validation_steps = min(cfg.validation.validation_steps, max(1, most))
    data = loader.Data(
        dataset=encoding.EncodedEdits(cfg, train, embeddings),
        bucket_ids=train.buckets,
        shape_ids=train.source_shapes(),
        digest=order.data_digest(train.records, train.buckets),
    )
    saved = read_state(run.resume) if run.resume else {"step": 0, "segments": []}
    sampler = loader.make_sampler(data, cfg.batch, run, cfg.run.seed, saved["segments"], saved["step"])
    to_see = train.views(cfg, sampler, cfg.batch.steps_for(len(data), run.world_size))
    wanted = loader.rows_to_encode(run, cfg, train.records, train.buckets, data.shape_ids)
    to_see = {view for view in to_see if view.row in wanted}
    held_out_views = held_out.first_views(cfg)
    items = encoding.what_to_encode(cfg, embeddings, [(train, to_see), (held_out, set(held_out_views))], shown)
    encoding.encode_missing(cfg, run, folder, embeddings, items)
    sizes = order.describe_buckets(train.records, train.buckets)
    run.print(f"{len(data)} rows to train on, {len(held_out_views)} held out; {sizes}")
    data.held_out = [
        encoding.load_view(cfg, embeddings, record, view, empty=False)
        for record, view in zip(held_out.records, held_out_views, strict=True)
    ]
    data.shown = [
        (edit, *(embeddings[edit.key(embeddings, empty)]["prompt_embeds"] for empty in (False, True)))
        for edit in shown
    ]
    return data


def random_sample(cfg: Config, transformer: dict, rng: torch.Generator) -> dict[str, Tensor]:
    """What one encoded row looks like at full size; transformer: its config. The benchmark's data."""
    side = cfg.image_sample_size // 8
    sample = {"latents": torch.randn(16, 1, side, side, generator=rng)}
    for which in range(cfg.benchmark_sources):  # the pipelines size them to 1024 x 1024, whatever the target
        sample[f"source_{which}"] = torch.randn(16, 1, 128, 128, generator=rng)
    prompt_embeds = torch.randn(cfg.benchmark_prompt_tokens, transformer["joint_attention_dim"], generator=rng)
    return {**sample, "prompt_embeds": prompt_embeds}


def warn_of_other_mode(run: Run, cfg: Config, folder: Path) -> None:
    """A checkpoint's model_index.json names its pipeline: with the other one, prompts are encoded in another way."""
    index, own = folder / "model_index.json", edits.PIPELINES[cfg.train_mode].__name__
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


# ---------------------------------------------------------------- model


@dataclass
class Models:
    """What compute_loss and validate call, and what they need of it."""

    transformer: torch.nn.Module  # as the strategy wraps it; call this one
    config: dict  # of the transformer
    scheduler_config: dict
    device: torch.device
    dtype: torch.dtype  # what the transformer computes in
    ema: Ema | None = None
    vae: AutoencoderKLQwenImage | None = None  # for validation's pictures


def choose_trained(run: Run, cfg: Config, transformer: QwenImageTransformer2DModel) -> None:
    """LoRA adapters or the model's own weights, all or some. Says which."""
    if cfg.lora.lora_rank:
        adapters.add(run, cfg, transformer)
    else:
        low = cfg.videox_fun.trainable_modules_low_learning_rate
        run.print(trained_parts.train_matching(transformer, cfg.trainable_modules, low))


def forward_flops(config: dict, image_tokens: int, prompt_tokens: int) -> float:
    """FLOPs of one sample's forward (matrix products and attention, 2 a multiply-add); 73.1e12 at 1024 x 1024 with 256
    prompt tokens and no source. Sources count as image tokens."""
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


def predict_velocity(
    models: Models, noisy_latents: Tensor, sigma: Tensor, prompts: list[Tensor], sources: list[Tensor]
) -> Tensor:
    """Call the transformer as the pipeline does: noisy_latents (B, 16, 1, H, W), sigma (B,), sources
    [(B, 16, 1, h, w), ...] -> packed velocity_pred (B, S, 64) of the target's tokens alone."""
    images = [noisy_latents, *(source.to(models.device) for source in sources)]
    packed = torch.cat([pack_latents(each) for each in images], dim=1)  # (B, S + sources, 64)
    prompt_embeds, prompt_embeds_mask = pad_prompts([prompt.to(models.device, models.dtype) for prompt in prompts])
    velocity_pred = models.transformer(
        hidden_states=packed.to(models.dtype),
        timestep=(sigma * 1000).to(models.dtype) / 1000,  # (B,), rounded as the pipeline rounds its timesteps
        guidance=None,
        encoder_hidden_states_mask=prompt_embeds_mask,  # (B, L) or None
        encoder_hidden_states=prompt_embeds,  # (B, L, D)
        img_shapes=[[(1, each.shape[-2] // 2, each.shape[-1] // 2) for each in images]] * len(noisy_latents),
        attention_kwargs={},
        return_dict=False,
    )[0]
    return velocity_pred[:, : noisy_latents.shape[-2] * noisy_latents.shape[-1] // 4]


def sources_of(batch: dict) -> list[Tensor]:
    """The source latents of a micro-batch, in the manifest's order."""
    return [batch[f"source_{which}"] for which in range(sum(name.startswith("source_") for name in batch))]


def sample_errors(models: Models, batch: dict, latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """(B,) what is minimised, of each sample: latents and noise (B, 16, 1, H/8, W/8), sigma (B,). Training and the
    held-out loss both call it."""
    noisy_latents = fm.add_noise(latents, noise, sigma)
    velocity_pred = predict_velocity(models, noisy_latents, sigma, batch["prompt_embeds"], sources_of(batch))
    target, weights = fm.velocity_target(latents, noise), fm.error_weights(batch, latents)
    return fm.squared_errors(velocity_pred, pack_latents(target), pack_latents(weights))  # of (B, S, 64)


def compute_loss(models: Models, batch: dict, cfg: Config) -> tuple[Tensor, dict]:
    """One micro-batch's loss, and what the meter adds up.

    Noise, sigma and dropout depend on (seed, step, position) alone. The data set has dropped captions already.
    """
    device = models.device
    rngs, uniform, _ = edits.draws(cfg, batch["step"], batch["positions"], batch["group_size"])
    latents = batch["latents"].to(device)  # (B, 16, 1, H/8, W/8) float32
    noise = fm.draw_normal(rngs, latents.shape[1:]).to(device)  # (B, 16, 1, H/8, W/8)
    if "posterior_std" in batch:
        latents = latents + batch["posterior_std"].to(device) * fm.draw_normal(rngs, latents.shape[1:]).to(device)
    target_tokens, *source_tokens = (each.shape[-2] * each.shape[-1] // 4 for each in (latents, *sources_of(batch)))
    shift = fm.checkpoint_shift(target_tokens, models.scheduler_config)
    flow = from_videox_fun.flow_of(cfg.videox_fun, cfg.flow, cfg.uniform_sampling)
    sigma = fm.draw_sigmas(uniform, flow, shift).to(device)  # (B,)

    errors = sample_errors(models, batch, latents, noise, sigma)  # (B,)
    loss = (fm.loss_weights(sigma, cfg.flow.loss_weighting) * errors).mean()
    prompt_tokens = max(map(len, batch["prompt_embeds"]))
    flops = len(latents) * forward_flops(models.config, target_tokens + sum(source_tokens), prompt_tokens)
    return loss, metrics.of_latents(latents) | {"forward_flops": flops}


def trial(cfg: Config, run: Run, transformer: torch.nn.Module, batch: dict) -> list[Tensor]:
    """The loss of a batch on a transformer without memory: what plan adds up."""
    meta, scheduler = torch.device("meta"), folders.part_config(RECIPE / "full_size" / "scheduler")
    models = Models(transformer, loading.config_of(transformer), scheduler, meta, run.compute_dtype)
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
    """The unmodified pipeline around the model as the strategy wraps it: source, target where it is known, and
    prediction of each edit, and grid.png in folder."""
    pipeline = edits.PIPELINES[cfg.train_mode](
        scheduler=FlowMatchEulerDiscreteScheduler.from_config(models.scheduler_config),
        vae=models.vae,
        text_encoder=None,
        tokenizer=None,
        processor=None,
        transformer=run.unwrap(models.transformer),
    )
    pipeline.set_progress_bar_config(disable=True)
    for index, (edit, prompt_embeds, empty), counts in run.in_step(data.shown):
        prompt_embeds = prompt_embeds[None].to(run.device, models.dtype)  # (1, L, D)
        empty = empty[None].to(run.device, models.dtype)  # (1, L, D)
        width, height = edit.size(cfg, 2 * pipeline.vae_scale_factor)
        image = pipeline(
            image=edit.sources if cfg.train_mode == "qwen_image_edit_plus" else edit.sources[0],
            prompt_embeds=prompt_embeds,
            prompt_embeds_mask=torch.ones(prompt_embeds.shape[:2], dtype=torch.long, device=run.device),
            negative_prompt_embeds=empty,
            negative_prompt_embeds_mask=torch.ones(empty.shape[:2], dtype=torch.long, device=run.device),
            true_cfg_scale=cfg.drawing.guidance_scale,
            width=width,
            height=height,
            num_inference_steps=cfg.drawing.num_inference_steps,
            generator=torch.Generator().manual_seed(cfg.run.seed + index),
        ).images[0]
        if counts:
            pictures.save_picture(folder, index, edit.text, image, **edit.beside(cfg, (width, height)))
    pictures.save_grid(run, folder, [edit.text for edit, _, _ in data.shown])


# ---------------------------------------------------------------- main


def main(argv: list[str] | None = None) -> None:
    cfg = config.parse_recipe(Config, argv, from_videox_fun.SECOND_NAMES, from_videox_fun.SKIPPED)
    run = launch.set_up(cfg, RECIPE, argv)  # processes, strategy, output folder, the checkpoint to go on from

    folder = folders.model_folder(cfg, run, PARTS, RECIPE / "full_size")
    weights = folders.weights_folder(cfg.tuning.transformer_path, folder)
    transformer = loading.empty_model(QwenImageTransformer2DModel, folders.part_config(weights))
    choose_trained(run, cfg, transformer)
    model_config = loading.config_of(transformer)
    plan.check_size(run, cfg, transformer, model_config, random_sample, trial)  # said before hours of encoding
    data = loader.random_data(cfg, model_config, random_sample) if run.benchmark else prepare_data(cfg, run, folder)
    cfg.batch.max_train_steps = cfg.batch.steps_for(len(data), run.world_size)

    transformer = adapters.load(run, cfg, transformer, weights)  # shard by shard; checkpointed, compiled
    videox_fun = cfg.videox_fun
    low = videox_fun.trainable_modules_low_learning_rate
    groups = trained_parts.rate_groups(transformer, cfg.trainable_modules, low)
    optimizer = optimizers.build_optimizer(run, transformer, cfg.tuning.optimizer, cfg.optim, groups)
    model, optimizer = launch.prepare(run, transformer, optimizer, cfg.tuning.gradient_release)
    models = Models(
        transformer=model,
        config=model_config,
        scheduler_config=folders.part_config(folder / "scheduler"),
        device=run.device,
        dtype=run.compute_dtype,
        ema=Ema.of(transformer, cfg.tuning.ema_decay),
        vae=encoding.load_vae(folder, run.device, run.compute_dtype, videox_fun.vae_path) if run.validates else None,
    )
    state = checkpoint.resume(run, cfg, model, optimizer, models.ema, data.digest, models.config)
    sampler = loader.make_sampler(data, cfg.batch, run, cfg.run.seed, state.segments, state.step)
    if cfg.run.dry_run:
        losses = partial(fm.errors_by_sigma, sample_errors, models, seed=cfg.run.seed, device=run.device)
        sample = partial(encoding.sample_to_look_at, cfg, folder, data.dataset)
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
