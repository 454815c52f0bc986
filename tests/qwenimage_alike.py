"""What Qwen-Image and Qwen-Image 2.1 prove alike: parity with their unmodified pipelines, and that pictures come back.

The world of a parity test is a recipe's encoders and models, and its pipeline with a spy on the transformer that both
use, with the latents' channels and how many pixels a side one stands for.
"""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from parity import Spy, assert_same_call, call_of_loss, first, mixed
from PIL import Image

from common.data import images, loader
from common.data.order import Place
from common.start.config import parse_recipe
from common.step.flow_matching import (
    draw_normal,
    draw_uniform,
    sample_rngs,
    sample_sigmas,
    shift_sigmas,
    velocity_target,
)
from tiny import shapes

WIDTH, HEIGHT = 96, 64  # not square: a swap of the two fails
SIZE = (WIDTH, HEIGHT)
TOKENS = WIDTH * HEIGHT // 256
PROMPTS = ["a red circle on the left, on a white background", "a cross"]  # of different lengths


def make_world(
    train: ModuleType,
    model_folder: Path,
    dtype: torch.dtype,
    pipeline_class: type,
    prompt: Callable[[object, str], dict],
    image: Callable[[int], Image.Image],
    channels: int,
    factor: int,
) -> SimpleNamespace:
    """prompt(encoders, text): what they make of a text alone; image(number): the picture of a sample; factor: pixels
    of a latent's side."""
    encoders = train.Encoders(settings(train), model_folder, torch.device("cpu"), dtype)
    # a schedule without shift and stretch, so that the pipeline can be told which sigma to use
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(
        model_folder / "scheduler", use_dynamic_shifting=False, shift_terminal=None, shift=1.0
    )
    pipeline = pipeline_class.from_pretrained(model_folder, scheduler=scheduler, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    spy = Spy(pipeline.transformer)
    models = train.Models(
        transformer=pipeline.transformer,
        config=dict(pipeline.transformer.config),
        scheduler_config=FlowMatchEulerDiscreteScheduler.load_config(model_folder / "scheduler"),
        empty_prompt_embeds=prompt(encoders, "")["prompt_embeds"],
        dtype=dtype,
    )
    cfg = settings(train, caption_dropout=0.0)
    everything = dict(train=train, encoders=encoders, pipeline=pipeline, spy=spy, models=models, cfg=cfg, dtype=dtype)
    return SimpleNamespace(**everything, prompt=prompt, image=image, channels=channels, factor=factor, encoded={})


def prompt_of_texts(encoders: object, text: str) -> dict:
    return {"prompt_embeds": encoders.prompts([text])[0]}


def prompt_without_sources(encoders: object, text: str) -> dict:
    return encoders.prompt(text, [])


def settings(train: ModuleType, **values: object):
    """The recipe's defaults, but for these."""
    flags = [str(word) for name, value in values.items() for word in (f"--{name}", value)]
    return parse_recipe(train.Config, ["--train_data_dir", "unused", "--seed", "5", *flags])


def place(position: int, step: int = 3) -> dict[str, int]:
    """What the loader adds to a sample."""
    return loader.of_place(Place(position, step, position, tuple(range(40))))


def encoded(world: SimpleNamespace, number: int) -> dict:
    if number not in world.encoded:
        pixels = images.image_to_tensor(world.image(number))
        prompt = world.prompt(world.encoders, PROMPTS[number % len(PROMPTS)])
        world.encoded[number] = {**prompt, **first(world.encoders.images(pixels[None], moments=False))}
    return world.encoded[number]


def batch(world: SimpleNamespace, numbers: list[int], step: int = 3) -> dict:
    """A micro-batch as the loader makes it; the pictures' positions in the step are their numbers."""
    return loader.collate([{**encoded(world, number), **place(number, step)} for number in numbers])


def packed(world: SimpleNamespace, latents: torch.Tensor) -> torch.Tensor:
    """(B, C, 1, h, w) -> (B, tokens, channels), by the pipeline's own means."""
    height, width = HEIGHT // world.factor, WIDTH // world.factor
    return world.pipeline._pack_latents(latents, len(latents), world.channels, height, width)


def noisy_by_diffusers(world: SimpleNamespace, numbers: list[int], step: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """(noisy latents (B, C, 1, h, w), sigma (B,)) from the same random numbers, encoded and mixed by diffusers' own
    means."""
    pipeline, vae = world.pipeline, world.encoders.vae
    drawn = [world.image(number) for number in numbers]
    pixels = pipeline.image_processor.preprocess(drawn).float()  # (B, 3 or 4, H, W)
    with torch.no_grad():
        latents = vae.encode(pixels[:, :, None]).latent_dist.mode()
    mean, std = vae.config.latents_mean, vae.config.latents_std
    latents = torch.stack([(latents[:, c] - mean[c]) / std[c] for c in range(world.channels)], dim=1)
    rngs = sample_rngs(world.cfg.run.seed, step, numbers)
    uniform, _ = draw_uniform(rngs), draw_uniform(rngs)
    noise = draw_normal(rngs, latents.shape[1:])
    mu = 0.5 + (0.9 - 0.5) * (TOKENS - 256) / (8192 - 256)
    sigma = shift_sigmas(sample_sigmas(uniform, "logit_normal"), float(np.exp(mu))).to(torch.float64)
    noisy = torch.cat(
        [
            mixed(world.pipeline.scheduler, latent[None], float(s), n[None])
            for latent, s, n in zip(latents, sigma, noise, strict=True)
        ]
    )
    return noisy, sigma


def check_one_sample(world: SimpleNamespace, call_of_pipeline: Callable[..., dict], number: int) -> None:
    noisy, sigma = noisy_by_diffusers(world, [number])
    ours = call_of_loss(world, batch(world, [number]))
    pipelines = call_of_pipeline(world, [PROMPTS[number]], noisy, sigma.item())
    assert_same_call(ours, pipelines, {"hidden_states": 1e-5 if world.dtype == torch.float32 else 1e-2})
    assert ours["encoder_hidden_states_mask"] is None and ours["img_shapes"] == [[(1, HEIGHT // 16, WIDTH // 16)]]
    assert 0 < ours["timestep"].item() <= 1


def check_two_unequal_prompts(world: SimpleNamespace, call_of_pipeline: Callable[..., dict], tolerance: float) -> None:
    ours = call_of_loss(world, batch(world, [0, 1]))
    noisy, _ = noisy_by_diffusers(world, [0, 1])
    pipelines = call_of_pipeline(world, PROMPTS, noisy, 0.5)
    for name in ("timestep", "hidden_states"):  # the pipeline has one sigma for the batch; test_one_sample compares
        assert ours[name].shape == pipelines[name].shape and ours[name].dtype == pipelines[name].dtype
        ours[name] = pipelines[name]
    # the text encoder's batch of two differs from two batches of one in the last bits
    assert_same_call(ours, pipelines, {"encoder_hidden_states": tolerance})
    assert ours["encoder_hidden_states_mask"].sum(1).tolist() == [
        len(encoded(world, n)["prompt_embeds"]) for n in (0, 1)
    ]


def check_loss_is_the_mean_of_each(world: SimpleNamespace, one_number: int, other_number: int) -> None:
    if world.dtype != torch.float32:
        pytest.skip("compared in float32")
    with torch.no_grad():
        both, one, other = (
            world.train.compute_loss(world.models, batch(world, numbers), world.cfg)[0].item()
            for numbers in ([one_number, other_number], [one_number], [other_number])
        )
    assert both == pytest.approx((one + other) / 2, rel=1e-5) and abs(one - other) > 1e-4


def check_velocity_target(world: SimpleNamespace) -> None:
    latents = encoded(world, 0)["latents"][None]
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    scheduler = world.pipeline.scheduler
    scheduler.set_timesteps(sigmas=[1.0])
    scheduler.set_begin_index(0)
    target = world.train.pack_latents(velocity_target(latents, noise))
    start = packed(world, noise)
    end = scheduler.step(target, scheduler.timesteps[0], start, return_dict=False)[0]
    unpacked = world.pipeline._unpack_latents(end, HEIGHT, WIDTH, world.pipeline.vae_scale_factor)
    torch.testing.assert_close(unpacked, latents, atol=1e-5, rtol=1e-4)


def check_perfect_prediction(world: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    if world.dtype != torch.float32:
        pytest.skip("compared in float32")
    made = batch(world, [0, 1])
    rngs = sample_rngs(world.cfg.run.seed, 3, [0, 1])
    draw_uniform(rngs), draw_uniform(rngs)
    noise = draw_normal(rngs, made["latents"].shape[1:])
    # d noisy / d sigma, packed by the pipeline
    perfect = packed(world, noise - made["latents"])
    monkeypatch.setattr(world.models, "transformer", lambda **named: (perfect,))
    loss, measured = world.train.compute_loss(world.models, made, world.cfg)
    assert loss.item() < 1e-10 and measured["samples"] == 2
    assert measured["latents_mean"].item() == pytest.approx(made["latents"].mean().item())
    assert measured["latents_std"].item() == pytest.approx(made["latents"].std().item())


def check_empty_caption(world: SimpleNamespace) -> None:
    expected, mask, *_ = world.pipeline.encode_prompt([""])
    assert mask is None or mask.all()
    assert torch.equal(world.models.empty_prompt_embeds, expected[0]) and expected.abs().sum() > 0
    dropped = 0
    samples = [{**encoded(world, n), **place(p, step=9)} for p, n in zip(range(40), itertools.cycle([0, 1]))]
    world.spy.calls.clear()
    cfg = settings(world.train, caption_dropout=0.25)
    with torch.no_grad():
        world.train.compute_loss(world.models, loader.collate(samples), cfg)
    (call,) = world.spy.calls
    lengths = call["encoder_hidden_states_mask"].sum(1).tolist()
    for sample, length, embeds in zip(samples, lengths, call["encoder_hidden_states"], strict=True):
        is_empty = length == len(expected[0]) and torch.equal(embeds[:length], expected[0])
        dropped += is_empty
        assert is_empty or torch.equal(embeds[:length], sample["prompt_embeds"].to(world.dtype))
    assert 3 <= dropped <= 18, dropped


def check_moments(world: SimpleNamespace) -> None:
    pixels = images.image_to_tensor(world.image(0))
    vae = world.encoders.vae
    kept = first(world.encoders.images(pixels[None], moments=True))
    with torch.no_grad():
        posterior = vae.encode(pixels[None, :, None]).latent_dist
    for c in range(world.channels):
        std = posterior.std[0, c] / vae.config.latents_std[c]
        torch.testing.assert_close(kept["posterior_std"][c], std)
    assert torch.equal(kept["latents"], world.encoders.images(pixels[None], moments=False)["latents"][0])


def check_decoding(world: SimpleNamespace) -> None:
    if world.dtype != torch.float32:
        pytest.skip("compared in float32")
    latents = encoded(world, 0)["latents"][None]
    vae = world.encoders.vae
    with torch.no_grad():
        pixels = images.image_to_tensor(world.image(0))
        direct = vae.decode(vae.encode(pixels[None, :, None]).latent_dist.mode()).sample

    def stay(pipeline, i, t, tensors):  # whatever the random transformer did, decode the given latents
        return {"latents": packed(world, latents)}

    drawn = world.pipeline(
        prompt=PROMPTS[:1], height=HEIGHT, width=WIDTH, sigmas=[0.5], true_cfg_scale=1.0,
        output_type="pt", callback_on_step_end=stay,
    ).images  # fmt: skip
    torch.testing.assert_close(drawn[0], (direct[0, :, 0] / 2 + 0.5).clamp(0, 1), atol=1e-4, rtol=1e-4)


# ---- a transformer trained on two pictures


SCENES = {  # two, so that a prompt that says nothing to the transformer fails
    "a red circle on the left, on a white background": ("red", "circle", "on the left", "white"),
    "a blue cross on the right, on a black background": ("blue", "cross", "on the right", "black"),
}
STEPS, BATCH = 240, 8


def overfitted(
    train: ModuleType,
    model_folder: Path,
    pipeline_class: type,
    make_transformer: Callable[..., torch.nn.Module],
    prompt: Callable[[object, str], dict],
    mode: str,
    channels: int,
) -> tuple:
    """The pipeline with the overfitted transformer, and each picture's normalised latents, encoded by diffusers' own
    means. mode: of the pictures, RGB or RGBA."""
    torch.manual_seed(0)
    sizes = dict(num_layers=2, attention_head_dim=32, num_attention_heads=4, axes_dims_rope=(8, 12, 12))
    transformer = make_transformer(**sizes)
    pipeline = pipeline_class.from_pretrained(model_folder, transformer=transformer)
    pipeline.set_progress_bar_config(disable=True)
    flags = ["--train_data_dir", "unused", "--caption_dropout", "0", "--timestep_sampling", "uniform"]
    cfg = parse_recipe(train.Config, flags)
    encoders = train.Encoders(cfg, model_folder, torch.device("cpu"), torch.float32)
    models = train.Models(
        transformer=transformer,
        config=json.loads(transformer.to_json_string()),
        scheduler_config=FlowMatchEulerDiscreteScheduler.load_config(model_folder / "scheduler"),
        empty_prompt_embeds=prompt(encoders, "")["prompt_embeds"],
        dtype=torch.float32,
    )
    samples, expected = [], {}
    mean, std = statistics(pipeline, channels)
    for text, (colour, shape, place, background) in SCENES.items():
        box = shapes.place_box(place, SIZE, 36)
        image = shapes.draw([shapes.Found(colour, shape, box)], background, SIZE).convert(mode)
        pixels = images.image_to_tensor(image)
        samples.append(first(encoders.encode([(text, None)], {"pixels": pixels[None]})))
        with torch.no_grad():
            latents = pipeline.vae.encode(pipeline.image_processor.preprocess(image)[:, :, None]).latent_dist.mode()
        expected[text] = (latents - mean) / std  # (1, C, 1, h, w)
    optimizer = torch.optim.AdamW(transformer.parameters(), weight_decay=0.0)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1, step / 20) * (1 - step / STEPS)
        places = [Place(position % 2, step, position, (0, 1) * (BATCH // 2)) for position in range(BATCH)]
        rows = [{**samples[place.sample], **loader.of_place(place)} for place in places]
        loss, _ = train.compute_loss(models, loader.collate(rows), cfg)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    print(f"last loss {loss.item():.4f}")
    return pipeline, expected


def statistics(pipeline, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean, std) of the VAE's latents, (1, C, 1, 1, 1) each."""
    mean, std = (torch.tensor(pipeline.vae.config[name]) for name in ("latents_mean", "latents_std"))
    return mean.view(1, channels, 1, 1, 1), std.view(1, channels, 1, 1, 1)


def draw(pipeline, text: str, seed: int, output_type: str):
    return pipeline(
        prompt=[text],
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=20,
        true_cfg_scale=1.0,
        generator=torch.Generator().manual_seed(seed),
        output_type=output_type,
    ).images[0]


def check_picture_comes_back(trained: tuple, text: str) -> None:
    pipeline, expected = trained
    for seed in (0, 1):
        packed = draw(pipeline, text, seed, "latent")[None]
        latents = pipeline._unpack_latents(packed, HEIGHT, WIDTH, pipeline.vae_scale_factor)
        error = (latents - expected[text]).norm() / expected[text].norm()
        other = next(value for key, value in expected.items() if key != text)
        print(
            f"{text}: relative error {error:.3f}, to the other picture {(latents - other).norm() / other.norm():.3f}"
        )
        assert error < 0.3


def check_reconstruction(trained: tuple, channels: int) -> None:
    pipeline, expected = trained
    text = next(iter(SCENES))
    mean, std = statistics(pipeline, channels)
    with torch.no_grad():
        reconstruction = pipeline.vae.decode(expected[text] * std + mean).sample[0, :, 0]
    drawn = draw(pipeline, text, 0, "pt")
    assert isinstance(draw(pipeline, text, 0, "pil"), Image.Image)
    reference = (reconstruction / 2 + 0.5).clamp(0, 1)
    spread = (reference - reference.mean()).norm()
    assert (drawn - reference).norm() < 0.5 * spread
