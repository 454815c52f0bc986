"""Pretrains the base of the tiny Qwen-Image (about 15 minutes on two CPU cores).

    python tiny/pretrain_qwenimage.py [--weights FILE] [--scale 0.001]

Its VAE learns to reconstruct drawings, its transformer to draw grey objects at named places on named backgrounds. The
weights go to the recipe's tiny_weights.safetensors.
"""

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline
from torch import Tensor

from tiny import building, pretraining

make_tiny = pretraining.load_make_tiny("qwenimage_fulltune")
SIZE, SEED = make_tiny.SIZE, make_tiny.SEED
LATENT_NOISE = 0.3


def decode(vae: AutoencoderKLQwenImage, latents: Tensor) -> Tensor:
    """(B, 16, 1, h, w) to (B, 3, 1, 8h, 8w). vae.decode() clamps to [-1, 1], which stops gradients."""
    return vae.decoder(vae.post_quant_conv(latents))


def pretrain_vae(vae: AutoencoderKLQwenImage, steps: int, n_pictures: int, batch_size: int, device: str) -> None:
    """On random scenes; then measures latents_mean and latents_std."""
    rng, counts = random.Random(SEED), (0, 1, 1, 1, 1, 2, 3)
    scenes = [pretraining.random_scene(rng, SIZE, counts, pretraining.square_extent) for _ in range(n_pictures)]
    pictures = pretraining.to_tensor(scenes)[:, :, None].to(device)  # (N, 3, 1, 64, 64)
    building.convolve_single_frames(vae)
    pretraining.train_autoencoder(
        vae, lambda latents: decode(vae, latents), pictures, steps, batch_size, LATENT_NOISE, penalty=1e-3, peak=3e-3
    )
    latents = pretraining.encode(vae, pictures[:1024])  # (N, 16, 1, 8, 8)
    vae.register_to_config(
        latents_mean=latents.mean((0, 2, 3, 4)).tolist(), latents_std=latents.std((0, 2, 3, 4)).tolist()
    )


def sharpen_decoder(vae: AutoencoderKLQwenImage, steps: int, n_pictures: int, batch_size: int, device: str) -> None:
    """On scenes of one object, as those that are fine-tuned on."""
    colours = (*make_tiny.COLOURS, "grey")
    scenes = pretraining.one_object_scenes(n_pictures, random.Random(SEED + 2), colours, make_tiny.SHAPES)
    pictures = pretraining.to_tensor(scenes)[:, :, None].to(device)  # (N, 3, 1, 64, 64)
    pretraining.sharpen_decoder(vae, lambda latents: decode(vae, latents), pictures, steps, batch_size, LATENT_NOISE)


def packed_latents_of(pipe: QwenImagePipeline, pictures: Tensor) -> Tensor:
    """(N, 3, 1, 64, 64) in [-1, 1] to normalised packed latents (N, 16, 64)."""
    latents = pretraining.encode(pipe.vae, pictures)  # (N, 16, 1, 8, 8)
    mean, std = (latents.new_tensor(pipe.vae.config[name]) for name in ("latents_mean", "latents_std"))
    latents = (latents - mean.view(1, -1, 1, 1, 1)) / std.view(1, -1, 1, 1, 1)
    return pipe._pack_latents(latents, len(latents), 16, SIZE // 8, SIZE // 8)


def pretrain_transformer(pipe: QwenImagePipeline, steps: int, n_pictures: int, batch_size: int, device: str) -> None:
    """Flow matching on grey objects."""
    scenes, texts = pretraining.grey_scenes(n_pictures, random.Random(SEED + 1), make_tiny.COLOURS, make_tiny.SHAPES)
    pipe.to(device)
    packed_latents = packed_latents_of(pipe, pretraining.to_tensor(scenes)[:, :, None].to(device))  # (N, 16, 64)
    unique = sorted(set(texts))
    with torch.no_grad():
        embeds, mask = pipe.encode_prompt(unique)  # (U, L, 64), (U, L)
    text_rows = torch.tensor([unique.index(text) for text in texts], device=device)

    def predict(noisy_latents: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        return pipe.transformer(
            hidden_states=noisy_latents,
            timestep=sigma,
            encoder_hidden_states=embeds[text_rows[rows]],
            encoder_hidden_states_mask=mask[text_rows[rows]],
            img_shapes=[[(1, SIZE // 16, SIZE // 16)]] * batch_size,
            return_dict=False,
        )[0]

    def shift(u: Tensor) -> Tensor:
        return 1.63 * u / (1 + 0.63 * u)  # as the scheduler does at 16 tokens

    pretraining.train_velocity(pipe.transformer, predict, packed_latents, shift, steps, batch_size)


def pretrain(path: Path, scale: float = 1.0) -> None:
    """Trains the VAE, then the transformer on its latents, and writes both; `scale` shrinks the work for a trial."""
    device = pretraining.seeded_device()
    pipe = make_tiny.build_pipeline(weights=None)
    pretrain_vae(pipe.vae, int(3000 * scale), int(12000 * scale), 16, device)
    pretrain_transformer(pipe, int(3000 * scale), int(8000 * scale), 32, device)
    sharpen_decoder(pipe.vae, int(4000 * scale), int(8000 * scale), 16, device)
    building.save_single_frame_weights(pipe, path)


if __name__ == "__main__":
    args = pretraining.parser_of(__doc__, make_tiny.WEIGHTS).parse_args()
    pretrain(args.weights, args.scale)
