"""The transformer is called in training as the unmodified QwenImage21Pipeline calls it: same names, shapes, dtypes,
values."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImage21Pipeline
from parity import Spy, assert_same_call, call_of_loss, first, mixed, picture
from PIL import Image

from common.data import encoding, images, loader
from common.data.manifest import Record
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

WIDTH, HEIGHT = 96, 64  # not square: a swap of the two fails
SIZE = (WIDTH, HEIGHT)
RESOLUTION, TOKENS = 64, WIDTH * HEIGHT // 256
PROMPTS = ["a red circle on the left, on a white background", "a cross"]  # of different lengths


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def world(request, train, model_folder) -> SimpleNamespace:
    """The recipe's encoders and models, and the unmodified pipeline with a spy on the transformer that both use."""
    dtype = getattr(torch, request.param)
    encoders = train.Encoders(settings(train), model_folder, torch.device("cpu"), dtype)
    # a schedule without shift and stretch, so that the pipeline can be told which sigma to use
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(
        model_folder / "scheduler", use_dynamic_shifting=False, shift_terminal=None, shift=1.0
    )
    pipeline = QwenImage21Pipeline.from_pretrained(model_folder, scheduler=scheduler, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    spy = Spy(pipeline.transformer)
    models = train.Models(
        transformer=pipeline.transformer,
        config=dict(pipeline.transformer.config),
        scheduler_config=FlowMatchEulerDiscreteScheduler.load_config(model_folder / "scheduler"),
        empty_prompt_embeds=encoders.prompt("", [])["prompt_embeds"],
        dtype=dtype,
    )
    cfg = settings(train, caption_dropout=0.0)
    everything = dict(train=train, encoders=encoders, pipeline=pipeline, spy=spy, models=models, cfg=cfg, dtype=dtype)
    return SimpleNamespace(**everything, encoded={})


def settings(train, **values: object):
    """The recipe's defaults, but for these."""
    flags = [str(word) for name, value in values.items() for word in (f"--{name}", value)]
    return parse_recipe(train.Config, ["--train_data_dir", "unused", "--seed", "5", *flags])


def rgba(number: int, size: tuple[int, int] = SIZE) -> Image.Image:
    """A picture with an alpha channel of its own."""
    image = picture(number, size).convert("RGBA")
    image.putalpha(picture(number + 50, size).convert("L"))
    return image


def place(position: int, step: int = 3) -> dict[str, int]:
    """What the loader adds to a sample."""
    return loader.of_place(Place(position, step, position, tuple(range(40))))


def encoded(world: SimpleNamespace, number: int) -> dict:
    if number not in world.encoded:
        pixels = images.image_to_tensor(rgba(number))
        prompt = world.encoders.prompt(PROMPTS[number % len(PROMPTS)], [])
        world.encoded[number] = {**prompt, **first(world.encoders.images(pixels[None], moments=False))}
    return world.encoded[number]


def batch(world: SimpleNamespace, numbers: list[int], step: int = 3) -> dict:
    """A micro-batch as the loader makes it; the pictures' positions in the step are their numbers."""
    return loader.collate([{**encoded(world, number), **place(number, step)} for number in numbers])


def noisy_by_diffusers(world: SimpleNamespace, numbers: list[int], step: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """(packed noisy latents (B, S, 64), sigma (B,)) from the same random numbers, encoded and mixed by diffusers' own
    means."""
    pipeline, vae = world.pipeline, world.encoders.vae
    pixels = pipeline.image_processor.preprocess([rgba(number) for number in numbers]).float()  # (B, 4, H, W)
    with torch.no_grad():
        latents = vae.encode(pixels[:, :, None]).latent_dist.mode()
    latents = torch.stack(
        [(latents[:, c] - vae.config.latents_mean[c]) / vae.config.latents_std[c] for c in range(64)], dim=1
    )
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
    return world.pipeline._pack_latents(noisy, len(noisy), 64, HEIGHT // 16, WIDTH // 16), sigma


def call_of_pipeline(
    world: SimpleNamespace, prompts: list[str], noisy: torch.Tensor, sigma: float, image=None
) -> dict:
    world.spy.calls.clear()
    world.pipeline(
        prompt=prompts, image=image, latents=noisy.to(world.dtype), sigmas=[sigma], height=HEIGHT, width=WIDTH,
        true_cfg_scale=1.0, output_resolution=RESOLUTION, output_type="latent", use_kv_cache=False,
    )  # fmt: skip
    (call,) = world.spy.calls
    return call


def tolerances(world: SimpleNamespace) -> dict[str, float]:
    return {"hidden_states": 1e-5 if world.dtype == torch.float32 else 1e-2}


@pytest.mark.parametrize("number", [0, 1])
def test_one_sample(world, number):
    """Catches a wrong prompt template, dropped tokens, normalisation, mixing, packing, timestep scale, img_shapes
    order, image mask or dtype, and a flattened alpha channel."""
    noisy, sigma = noisy_by_diffusers(world, [number])
    ours = call_of_loss(world, batch(world, [number]))
    pipelines = call_of_pipeline(world, [PROMPTS[number]], noisy, sigma.item())
    assert_same_call(ours, pipelines, tolerances(world))
    assert ours["encoder_hidden_states_mask"] is None and ours["img_shapes"] == [[(1, HEIGHT // 16, WIDTH // 16)]]
    assert 0 < ours["timestep"].item() <= 1


@pytest.mark.parametrize("sizes", [[(96, 64)], [(64, 128), (100, 100)]], ids=["one", "two"])
def test_sources(world, sizes, tmp_path):
    """Catches sources of another size, order or resampling than the pipeline's, flattened before the VAE or not
    flattened before the text encoder, encoded as a sample of the posterior, or behind the target."""
    for which, size in enumerate(sizes):
        rgba(7 + which, size).save(tmp_path / f"{which}.png")
    files = tuple(f"{which}.png" for which in range(len(sizes)))
    sources = world.train.source_images.of_row(Record(0, "", "", files), tmp_path, RESOLUTION)
    made = {**encoded(world, 0), **world.encoders.prompt(PROMPTS[0], sources), **place(0)}
    made |= {
        f"source_{which}": world.encoders.images(images.image_to_tensor(source)[None], moments=False)["latents"][0]
        for which, source in enumerate(sources)
    }
    ours = call_of_loss(world, loader.collate([made]))
    noisy, sigma = noisy_by_diffusers(world, [0])
    opened = [Image.open(tmp_path / file) for file in files]
    pipelines = call_of_pipeline(world, PROMPTS[:1], noisy, sigma.item(), opened)
    bf16 = world.dtype == torch.bfloat16  # the pipeline runs its VAE in bf16 too
    assert_same_call(ours, pipelines, {"hidden_states": 0.15 if bf16 else 1e-4})
    assert len(ours["img_shapes"][0]) == 1 + len(sizes) and ours["img_mask"].sum() > TOKENS // 4
    n_target = TOKENS
    torch.testing.assert_close(
        ours["hidden_states"][:, -n_target:], pipelines["hidden_states"][:, -n_target:], atol=1e-2, rtol=1e-2
    )
    loss = world.spy.results[-1].shape[1]
    assert loss > n_target, "the transformer answers for all tokens, and the loss is on the target's"


def test_a_batch_is_its_rows(world):
    """Catches prompts whose padding is seen or kept, and rows of a batch that are mixed up."""
    if world.dtype != torch.float32:
        pytest.skip("compared in float32")
    items = [(text, None) for text in (*PROMPTS, "a cross on the right")]
    read = [{"pixels": images.image_to_tensor(rgba(number)), "sources": []} for number in range(3)]
    source = {"source_0": images.image_to_tensor(rgba(9)), "sources": [rgba(9)]}
    for given in (read, [each | source for each in read]):
        together = encoding.encode_batch(world.encoders, items, given)
        for item, pixels, entry in zip(items, given, together, strict=True):
            (alone,) = encoding.encode_batch(world.encoders, [item], [pixels])
            assert alone.keys() == entry.keys()
            for name, tensor in alone.items():
                torch.testing.assert_close(entry[name], tensor, atol=1e-5, rtol=1e-4)
        assert not torch.equal(together[0]["latents"], together[1]["latents"])
        assert all(("empty_prompt_embeds" in entry) == (given is not read) for entry in together)


def test_two_unequal_prompts(world):
    """Catches a text mask that is not passed, or another padding than the pipeline's."""
    ours = call_of_loss(world, batch(world, [0, 1]))
    noisy, _ = noisy_by_diffusers(world, [0, 1])
    pipelines = call_of_pipeline(world, PROMPTS, noisy, 0.5)
    for name in (
        "timestep",
        "hidden_states",
    ):  # the pipeline has one sigma for the batch; compared sample by sample above
        assert ours[name].shape == pipelines[name].shape and ours[name].dtype == pipelines[name].dtype
        ours[name] = pipelines[name]
    # the text encoder's batch of two is padded on the left: positions differ, and with them the last bits
    assert_same_call(ours, pipelines, {"encoder_hidden_states": 1e-4 if world.dtype == torch.float32 else 0.2})
    assert ours["encoder_hidden_states_mask"].sum(1).tolist() == [
        len(encoded(world, n)["prompt_embeds"]) for n in (0, 1)
    ]


def test_loss_of_two_of_one_length_is_the_mean_of_each(world):
    """Catches samples of a micro-batch that see each other, and noise that depends on the micro-batch."""
    if world.dtype != torch.float32:
        pytest.skip("compared in float32")
    with torch.no_grad():
        both, one, other = (
            world.train.compute_loss(world.models, batch(world, numbers), world.cfg)[0].item()
            for numbers in ([0, 2], [0], [2])
        )
    assert both == pytest.approx((one + other) / 2, rel=1e-5) and abs(one - other) > 1e-4


def test_velocity_target_through_the_pipelines_scheduler(world):
    """Catches the target's sign and scale: one Euler step of the pipeline along the target from sigma 1 lands on the
    latents."""
    latents = encoded(world, 0)["latents"][None]
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    scheduler = world.pipeline.scheduler
    scheduler.set_timesteps(sigmas=[1.0])
    scheduler.set_begin_index(0)
    target = world.train.pack_latents(velocity_target(latents, noise))
    start = world.pipeline._pack_latents(noise, 1, 64, HEIGHT // 16, WIDTH // 16)
    end = scheduler.step(target, scheduler.timesteps[0], start, return_dict=False)[0]
    unpacked = world.pipeline._unpack_latents(end, HEIGHT, WIDTH, world.pipeline.vae_scale_factor)
    torch.testing.assert_close(unpacked, latents, atol=1e-5, rtol=1e-4)


def test_prediction_is_compared_with_the_target_token_by_token(world, monkeypatch):
    """Catches a loss whose target is packed otherwise than the prediction, or has the wrong sign: a perfect prediction
    has loss zero."""
    if world.dtype != torch.float32:
        pytest.skip("compared in float32")
    made = batch(world, [0, 1])
    rngs = sample_rngs(world.cfg.run.seed, 3, [0, 1])
    draw_uniform(rngs), draw_uniform(rngs)
    noise = draw_normal(rngs, made["latents"].shape[1:])
    # d noisy / d sigma, packed by the pipeline
    perfect = world.pipeline._pack_latents(noise - made["latents"], 2, 64, HEIGHT // 16, WIDTH // 16)
    monkeypatch.setattr(world.models, "transformer", lambda **named: (perfect,))
    loss, measured = world.train.compute_loss(world.models, made, world.cfg)
    assert loss.item() < 1e-10 and measured["samples"] == 2
    assert measured["latents_mean"].item() == pytest.approx(made["latents"].mean().item())
    assert measured["latents_std"].item() == pytest.approx(made["latents"].std().item())


def test_empty_caption_is_the_encoded_one(world):
    """Catches zeros in place of the encoded "" for caption dropout, and a share of dropped captions that is not the
    one asked for."""
    expected, mask, _ = world.pipeline.encode_prompt([""])
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


def test_moments_give_the_posterior(world):
    """Catches a posterior whose standard deviation is not divided by latents_std as its mean is."""
    pixels = images.image_to_tensor(rgba(0))
    vae = world.encoders.vae
    kept = first(world.encoders.images(pixels[None], moments=True))
    with torch.no_grad():
        posterior = vae.encode(pixels[None, :, None]).latent_dist
    for c in range(64):
        std = posterior.std[0, c] / vae.config.latents_std[c]
        torch.testing.assert_close(kept["posterior_std"][c], std)
    assert torch.equal(kept["latents"], world.encoders.images(pixels[None], moments=False)["latents"][0])


def test_decoding_undoes_encoding(world):
    """Catches latents_std inverted, or mean and std exchanged: the pipeline decodes the recipe's latents to what the
    VAE reconstructs."""
    if world.dtype != torch.float32:
        pytest.skip("compared in float32")
    latents = encoded(world, 0)["latents"][None]
    vae = world.encoders.vae
    with torch.no_grad():
        pixels = images.image_to_tensor(rgba(0))
        direct = vae.decode(vae.encode(pixels[None, :, None]).latent_dist.mode()).sample
    packed = world.pipeline._pack_latents(latents, 1, 64, HEIGHT // 16, WIDTH // 16)

    def stay(pipeline, i, t, tensors):  # whatever the random transformer did, decode the given latents
        return {"latents": packed}

    drawn = world.pipeline(
        prompt=PROMPTS[:1], height=HEIGHT, width=WIDTH, sigmas=[0.5], true_cfg_scale=1.0,
        output_type="pt", callback_on_step_end=stay,
    ).images  # fmt: skip
    torch.testing.assert_close(drawn[0], (direct[0, :, 0] / 2 + 0.5).clamp(0, 1), atol=1e-4, rtol=1e-4)
