"""A transformer trained by the recipe's compute_loss on two pictures draws them from pure noise through the unmodified
pipeline: told apart by their prompts, or by their reference images alone."""

import json
from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from parity import first
from PIL import Image

from common.data.images import image_to_tensor
from tiny import shapes

pytestmark = pytest.mark.slow

WIDTH, HEIGHT = 96, 64
LENGTH = 32  # max_sequence_length
SCENES = {  # two, so that a prompt or a reference that says nothing to the transformer fails
    "a red circle on the left, on a white background": ("red", "circle", "on the left", "white"),
    "a blue cross on the right, on a black background": ("blue", "cross", "on the right", "black"),
}
STEPS, BATCH = 160, 8


def scene(colour: str, shape: str, place: str, background: str) -> Image.Image:
    box = shapes.place_box(place, (WIDTH, HEIGHT), 36)
    return shapes.draw([shapes.Found(colour, shape, box)], background, (WIDTH, HEIGHT))


@pytest.fixture(scope="module", params=["prompts", "references"])
def trained(request, train, settings, model_folder) -> SimpleNamespace:
    """The pipeline with the overfitted transformer, what it is to be asked for, and each picture's normalised latents,
    encoded by diffusers' own means."""
    torch.manual_seed(0)
    edges = json.loads((model_folder / "transformer/config.json").read_text())
    edges = {name: edges[name] for name in ("in_channels", "joint_attention_dim", "guidance_embeds")}
    sizes = dict(num_layers=1, num_single_layers=2, attention_head_dim=32, num_attention_heads=4)
    transformer = Flux2Transformer2DModel(**edges, **sizes, axes_dims_rope=(8, 8, 8, 8))
    pipeline = Flux2KleinPipeline.from_pretrained(model_folder, transformer=transformer)
    pipeline.set_progress_bar_config(disable=True)
    flags = {"timestep_sampling": "uniform", "shift_rule": "empirical", "max_sequence_length": LENGTH}
    cfg = settings(caption_dropout=0.0, **flags)
    encoders = train.Encoders(cfg, model_folder, torch.device("cpu"), torch.float32)
    models = train.Models(
        transformer=transformer,
        config=json.loads(transformer.to_json_string()),
        scheduler_config=FlowMatchEulerDiscreteScheduler.load_config(model_folder / "scheduler"),
        empty_prompt_embeds=encoders.prompts([""])[0],
        dtype=torch.float32,
    )
    asked, samples, expected = [], [], []
    for text, (colour, *place) in SCENES.items():
        image = scene(colour, *place)
        if request.param == "prompts":
            asked.append({"prompt": text})
            reference = {}
        else:
            asked.append({"prompt": "the other half", "image": Image.new("RGB", (64, 64), shapes.COLOURS[colour])})
            pixels = train.reference_images.pixels(asked[-1]["image"], pipeline.image_processor)
            reference = {"reference_0": pixels[None]}
        item = (asked[-1]["prompt"], None)
        samples.append(first(encoders.encode([item], {"pixels": image_to_tensor(image)[None], **reference})))
        with torch.no_grad():
            expected.append(pipeline._encode_vae_image(pipeline.image_processor.preprocess(image), generator=None)[0])
    optimizer = torch.optim.AdamW(transformer.parameters(), weight_decay=0.0)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1, step / 20) * (1 - step / STEPS)
        places = [{"step": step, "position": position, "group_size": BATCH} for position in range(BATCH)]
        batch = train.loader.collate([{**samples[place["position"] % 2], **place} for place in places])
        loss, _ = train.compute_loss(models, batch, cfg)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    print(f"last loss {loss.item():.4f}")
    return SimpleNamespace(pipeline=pipeline, models=models, asked=asked, expected=expected, cfg=cfg, batch=batch)


def draw(trained: SimpleNamespace, number: int, seed: int) -> tuple[Image.Image, torch.Tensor]:
    """(picture, its normalised latents (C, H/16, W/16)) by the unmodified pipeline, from noise."""
    last = {}

    def keep(pipeline, i, t, tensors):
        last.update(tensors)
        return tensors

    image = trained.pipeline(
        **trained.asked[number],
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=20,
        guidance_scale=1.0,
        max_sequence_length=LENGTH,
        generator=torch.Generator().manual_seed(seed),
        callback_on_step_end=keep,
    ).images[0]
    return image, last["latents"][0].T.reshape(-1, HEIGHT // 16, WIDTH // 16)


@pytest.mark.parametrize("number", [0, 1])
def test_pictures_come_back_from_noise(trained, number):
    """Catches a wrong sign, scale, packing, template or normalisation anywhere between training and sampling, and
    references that do not reach the transformer or reach the wrong row.

    Not a wrong timestep: the model can read the noise level off its input. test_flux2klein_parity has it.
    """
    expected, other = trained.expected[number], trained.expected[1 - number]
    for seed in (0, 1):
        _, latents = draw(trained, number, seed)
        error = (latents - expected).norm() / expected.norm()
        print(f"relative error {error:.3f}, to the other picture {(latents - other).norm() / other.norm():.3f}")
        assert error < 0.3


def test_decoded_picture_is_the_vaes_reconstruction(trained, train):
    """Catches latents that are normalised in training otherwise than the pipeline undoes it."""
    vae = trained.pipeline.vae
    pixels = image_to_tensor(scene(*next(iter(SCENES.values()))))
    with torch.no_grad():
        reconstruction = vae.decode(vae.encode(pixels[None]).latent_dist.mode()).sample[0].clamp(-1, 1)
    image, _ = draw(trained, 0, 0)
    assert image.size == (WIDTH, HEIGHT)
    spread = (reconstruction - reconstruction.mean()).norm()
    assert (image_to_tensor(image) - reconstruction).norm() < 0.5 * spread


def test_reversed_sign_shows_in_the_loss(trained, train, monkeypatch):
    """Catches a target of latents - noise: for a model that predicts noise - latents the loss is then the mean of
    (2 (noise - latents))^2, four times the variance of the two together, as high as 6 and more for a real model."""
    losses = []
    for target in (train.fm.velocity_target, lambda latents, noise: latents - noise):
        monkeypatch.setattr(train.fm, "velocity_target", target)
        with torch.no_grad():
            losses.append(train.compute_loss(trained.models, trained.batch, trained.cfg)[0].item())
    right, reversed_sign = losses
    print(f"loss {right:.3f}, with the sign reversed {reversed_sign:.3f}")
    expected = 4 * (1 + trained.batch["latents"].square().mean().item())
    assert right < 0.4 and reversed_sign == pytest.approx(expected, rel=0.25) and reversed_sign > 5
