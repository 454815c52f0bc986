"""A transformer trained by the recipe's compute_loss on two pictures draws them from pure noise through the unmodified
pipeline."""

import json

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImage21Pipeline, QwenImage21Transformer2DModel
from parity import first
from PIL import Image

from common.data import images, loader
from common.data.order import Place
from common.start.config import parse_recipe
from tiny import shapes

WIDTH, HEIGHT = 96, 64
SCENES = {  # two, so that a prompt that says nothing to the transformer fails
    "a red circle on the left, on a white background": ("red", "circle", "on the left", "white"),
    "a blue cross on the right, on a black background": ("blue", "cross", "on the right", "black"),
}
STEPS, BATCH = 240, 8


@pytest.fixture(scope="module")
def trained(train, model_folder):
    """The pipeline with the overfitted transformer, and each picture's normalised latents, encoded by diffusers' own
    means."""
    torch.manual_seed(0)
    sizes = dict(num_layers=2, attention_head_dim=32, num_attention_heads=4, axes_dims_rope=(8, 12, 12))
    transformer = QwenImage21Transformer2DModel(context_in_dim=64, **sizes)
    pipeline = QwenImage21Pipeline.from_pretrained(model_folder, transformer=transformer)
    pipeline.set_progress_bar_config(disable=True)
    flags = ["--train_data_dir", "unused", "--caption_dropout", "0", "--timestep_sampling", "uniform"]
    cfg = parse_recipe(train.Config, flags)
    encoders = train.Encoders(cfg, model_folder, torch.device("cpu"), torch.float32)
    models = train.Models(
        transformer=transformer,
        config=json.loads(transformer.to_json_string()),
        scheduler_config=FlowMatchEulerDiscreteScheduler.load_config(model_folder / "scheduler"),
        empty_prompt_embeds=encoders.prompt("", [])["prompt_embeds"],
        dtype=torch.float32,
    )
    samples, expected = [], {}
    mean, std = (
        torch.tensor(pipeline.vae.config[name]).view(1, 64, 1, 1, 1) for name in ("latents_mean", "latents_std")
    )
    for text, (colour, shape, place, background) in SCENES.items():
        box = shapes.place_box(place, (WIDTH, HEIGHT), 36)
        image = shapes.draw([shapes.Found(colour, shape, box)], background, (WIDTH, HEIGHT)).convert("RGBA")
        pixels = images.image_to_tensor(image)
        samples.append(first(encoders.encode([(text, None)], {"pixels": pixels[None]})))
        with torch.no_grad():
            latents = pipeline.vae.encode(pipeline.image_processor.preprocess(image)[:, :, None]).latent_dist.mode()
        expected[text] = (latents - mean) / std  # (1, 64, 1, H/16, W/16)
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


@pytest.mark.slow
@pytest.mark.parametrize("text", SCENES)
def test_pictures_come_back_from_noise(trained, text):
    """Catches a wrong sign, scale, packing, template or normalisation anywhere between training and sampling.

    Not a wrong timestep: the model can read the noise level off its input. test_qwenimage21_parity has it.
    """
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


@pytest.mark.slow
def test_decoded_picture_is_the_vaes_reconstruction(trained):
    """Catches latents that are normalised in training otherwise than the pipeline undoes it."""
    pipeline, expected = trained
    text = next(iter(SCENES))
    mean, std = (
        torch.tensor(pipeline.vae.config[name]).view(1, 64, 1, 1, 1) for name in ("latents_mean", "latents_std")
    )
    with torch.no_grad():
        reconstruction = pipeline.vae.decode(expected[text] * std + mean).sample[0, :, 0]
    drawn = draw(pipeline, text, 0, "pt")
    assert isinstance(draw(pipeline, text, 0, "pil"), Image.Image)
    reference = (reconstruction / 2 + 0.5).clamp(0, 1)
    spread = (reference - reference.mean()).norm()
    assert (drawn - reference).norm() < 0.5 * spread
