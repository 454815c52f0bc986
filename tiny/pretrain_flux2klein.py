"""Pretrains the base of the tiny FLUX.2 Klein (minutes on a GPU).

    python tiny/pretrain_flux2klein.py [--weights FILE] [--scale 0.001]

Its VAE learns to reconstruct drawings, its transformer to draw grey objects at named places on named backgrounds, from
prompts of max_sequence_length 32. The weights go to the recipe's tiny_weights.safetensors.
"""

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from PIL import Image
from torch import Tensor

from tiny import building, pretraining, shapes

make_tiny = pretraining.load_make_tiny("flux2klein_fulltune")
SIZE, SEED = make_tiny.SIZE, make_tiny.SEED
MAX_SEQUENCE_LENGTH = 32  # text tokens, padding included: it is not masked, so it is part of what the base learns
INFERENCE_STEPS = 16  # that the base is made for: the pipeline's noise schedule depends on it
LATENT_NOISE = 0.3


def decode(vae: AutoencoderKLFlux2, latents: Tensor) -> Tensor:
    """(B, 8, h, w) to (B, 3, 8h, 8w)."""
    return vae.decode(latents).sample


def pretrain_vae(vae: AutoencoderKLFlux2, steps: int, n_pictures: int, batch_size: int, device: str) -> None:
    """On random scenes; then measures the batch norm's statistics."""
    rng, counts = random.Random(SEED), (0, 1, 1, 1, 1, 2, 3)
    scenes = [pretraining.random_scene(rng, SIZE, counts, pretraining.square_extent) for _ in range(n_pictures)]
    pictures = pretraining.to_tensor(scenes).to(device)  # (N, 3, 64, 64)
    pretraining.train_autoencoder(
        vae, lambda latents: decode(vae, latents), pictures, steps, batch_size, LATENT_NOISE, penalty=1e-3, peak=1.5e-3
    )
    patches = Flux2KleinPipeline._patchify_latents(pretraining.encode(vae, pictures[:1024]))  # (N, 32, 4, 4)
    vae.bn.running_mean.copy_(patches.mean((0, 2, 3)))
    vae.bn.running_var.copy_(patches.var((0, 2, 3)))


def sharpen_decoder(vae: AutoencoderKLFlux2, steps: int, n_pictures: int, batch_size: int, device: str) -> None:
    """On scenes of one object, as those that are fine-tuned on."""
    colours = (*make_tiny.COLOURS, "grey")
    scenes = pretraining.one_object_scenes(n_pictures, random.Random(SEED + 2), colours, make_tiny.SHAPES)
    pictures = pretraining.to_tensor(scenes).to(device)  # (N, 3, 64, 64)
    pretraining.sharpen_decoder(vae, lambda latents: decode(vae, latents), pictures, steps, batch_size, LATENT_NOISE)


def packed_latents_of(pipe: Flux2KleinPipeline, pictures: Tensor) -> Tensor:
    """(N, 3, 64, 64) in [-1, 1] to normalised packed latents (N, 16, 32)."""
    patches = pipe._patchify_latents(pretraining.encode(pipe.vae, pictures))  # (N, 32, 4, 4)
    return pipe._pack_latents(pipe.vae.bn(patches))  # in eval mode: by the running statistics, with their eps


def pretrain_transformer(pipe: Flux2KleinPipeline, steps: int, n_pictures: int, batch_size: int, device: str) -> None:
    """Flow matching on grey objects."""
    scenes, texts = pretraining.grey_scenes(n_pictures, random.Random(SEED + 1), make_tiny.COLOURS, make_tiny.SHAPES)
    pipe.to(device)
    packed_latents = packed_latents_of(pipe, pretraining.to_tensor(scenes).to(device))  # (N, 16, 32)
    img_ids = pipe._prepare_latent_ids(torch.empty(1, 1, SIZE // 16, SIZE // 16)).to(device)  # (1, 16, 4)
    unique = sorted(set(texts))
    with torch.no_grad():  # (U, 32, 96) and (U, 32, 4)
        embeds, txt_ids = pipe.encode_prompt(unique, max_sequence_length=MAX_SEQUENCE_LENGTH)
    text_rows = torch.tensor([unique.index(text) for text in texts], device=device)
    mu = compute_empirical_mu(packed_latents.shape[1], INFERENCE_STEPS)

    def predict(noisy_latents: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        return pipe.transformer(
            hidden_states=noisy_latents,
            timestep=sigma,
            encoder_hidden_states=embeds[text_rows[rows]],
            txt_ids=txt_ids[:1],
            img_ids=img_ids,
            return_dict=False,
        )[0]

    def shift(u: Tensor) -> Tensor:
        return pipe.scheduler.time_shift(mu, 1.0, u)  # as the pipeline's schedule: 15 of its 16 steps start above 0.4

    pretraining.train_velocity(pipe.transformer, predict, packed_latents, shift, steps, batch_size)


def plain_captions() -> list[str]:
    """Every shape at every place on white, no colour named."""
    return [f"a {shape} {place}, on a white background" for shape in make_tiny.SHAPES for place in shapes.PLACES]


def sample(pipe: Flux2KleinPipeline, prompts: list[str], guidance_scale: float = 2.0) -> list[Image.Image]:
    """What the unmodified pipeline draws, one seed a prompt."""
    return pipe(
        prompt=prompts,
        height=SIZE,
        width=SIZE,
        num_inference_steps=INFERENCE_STEPS,
        guidance_scale=guidance_scale,
        generator=[torch.Generator().manual_seed(i) for i in range(len(prompts))],
        max_sequence_length=MAX_SEQUENCE_LENGTH,
    ).images


def pretrain(path: Path, scale: float = 1.0) -> None:
    """Trains the VAE, then the transformer on its latents, and writes both; `scale` shrinks the work for a trial."""
    device = pretraining.seeded_device()
    pipe = make_tiny.build_pipeline(weights=None)
    pretrain_vae(pipe.vae, int(4500 * scale), int(12000 * scale), 16, device)
    pretrain_transformer(pipe, int(2500 * scale), int(8000 * scale), 32, device)
    sharpen_decoder(pipe.vae, int(3500 * scale), int(8000 * scale), 16, device)
    captions = plain_captions()
    drawn = zip(sample(pipe, captions), captions, strict=True)
    right = sum(shapes.shows(picture, text, check_place=True) for picture, text in drawn)
    print(f"the base draws {right} of {len(captions)} plain captions", flush=True)
    building.save_small(building.half_of(pipe, "vae", "transformer"), path)


if __name__ == "__main__":
    args = pretraining.parser_of(__doc__, make_tiny.WEIGHTS).parse_args()
    pretrain(args.weights, args.scale)
