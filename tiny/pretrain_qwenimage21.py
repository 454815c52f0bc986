"""Pretrains the base of the tiny Qwen-Image 2.1 (about twenty minutes of one CPU core).

    python tiny/pretrain_qwenimage21.py [--weights FILE] [--scale 0.001]

Its VAE learns to reconstruct drawings, transparent ones too; its transformer to draw grey objects at named places on
named backgrounds, and to repeat a source image. The weights go to the recipe's tiny_weights.safetensors.
"""

import random
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from diffusers import AutoencoderKLQwenImage21, QwenImage21Pipeline
from PIL import Image
from torch import Tensor

from tiny import building, pretraining, shapes

make_tiny = pretraining.load_make_tiny("qwenimage21_fulltune")
SIZE, SEED = make_tiny.SIZE, make_tiny.SEED
LATENT_NOISE = 0.3
ANY_COLOUR = (*make_tiny.COLOURS, "grey")


def to_tensor(pictures: list[Image.Image], device: str) -> Tensor:
    """PIL pictures, RGB or RGBA, to (N, 4, 1, 64, 64) in [-1, 1]."""
    return pretraining.to_tensor([picture.convert("RGBA") for picture in pictures])[:, :, None].to(device)


def random_scene(rng: random.Random) -> Image.Image:
    """Some objects anywhere; a quarter of the pictures are cut out of their background."""
    counts = (0, 1, 1, 1, 1, 2, 3)
    if rng.random() > 0.25:
        return pretraining.random_scene(rng, SIZE, counts, pretraining.square_extent)
    scene = rng.choice(ANY_COLOUR), rng.choice(make_tiny.SHAPES), rng.choice(list(shapes.PLACES)), "transparent"
    return make_tiny.draw_scene(*scene, rng)[0]


def decode(vae: AutoencoderKLQwenImage21, latents: Tensor) -> Tensor:
    """(B, 64, 1, h, w) to (B, 4, 1, 16h, 16w). vae.decode() clamps to [-1, 1], which stops gradients."""
    squares = vae.decoder(vae.post_quant_conv(latents)).unflatten(1, (4, 2, 2))  # (B, 4, 2, 2, 1, 8h, 8w): x before y
    return squares.permute(0, 1, 4, 5, 3, 6, 2).flatten(5, 6).flatten(3, 4)


def pretrain_vae(vae: AutoencoderKLQwenImage21, steps: int, n_pictures: int, batch_size: int, device: str) -> None:
    """On random scenes; then measures latents_mean and latents_std."""
    rng = random.Random(SEED)
    pictures = to_tensor([random_scene(rng) for _ in range(n_pictures)], device)  # (N, 4, 1, 64, 64)
    pretraining.train_autoencoder(
        vae, lambda latents: decode(vae, latents), pictures, steps, batch_size, LATENT_NOISE, penalty=1e-3, peak=3e-3
    )
    latents = pretraining.encode(vae, pictures[:1024])  # (N, 64, 1, 4, 4)
    vae.register_to_config(
        latents_mean=latents.mean((0, 2, 3, 4)).tolist(), latents_std=latents.std((0, 2, 3, 4)).tolist()
    )


def one_object_scene(rng: random.Random, colours: tuple[str, ...]) -> tuple[Image.Image, str]:
    """(picture, caption) of a scene as those that are fine-tuned on."""
    where = rng.choice(list(shapes.PLACES)), rng.choice(make_tiny.BACKGROUNDS)
    return make_tiny.draw_scene(rng.choice(colours), rng.choice(make_tiny.SHAPES), *where, rng)


def sharpen_decoder(vae: AutoencoderKLQwenImage21, steps: int, n_pictures: int, batch_size: int, device: str) -> None:
    """On scenes of one object, as those that are fine-tuned on."""
    rng = random.Random(SEED + 2)
    pictures = to_tensor([one_object_scene(rng, ANY_COLOUR)[0] for _ in range(n_pictures)], device)
    pretraining.sharpen_decoder(vae, lambda latents: decode(vae, latents), pictures, steps, batch_size, LATENT_NOISE)


def packed_latents_of(pipe: QwenImage21Pipeline, pictures: Tensor) -> Tensor:
    """(N, 4, 1, 64, 64) in [-1, 1] to normalised packed latents (N, 16, 64)."""
    latents = pretraining.encode(pipe.vae, pictures)  # (N, 64, 1, 4, 4)
    mean, std = (latents.new_tensor(pipe.vae.config[name]) for name in ("latents_mean", "latents_std"))
    latents = (latents - mean.view(1, -1, 1, 1, 1)) / std.view(1, -1, 1, 1, 1)
    return latents.flatten(2).transpose(1, 2)


def grey_captions(n: int, rng: random.Random) -> tuple[list[Image.Image], list[str]]:
    """Pictures of one grey object, and captions of which a quarter names a colour, which means nothing yet; a tenth is
    empty."""
    pictures, texts = [], []
    for _ in range(n):
        picture, text = one_object_scene(rng, ("grey",))
        pictures.append(picture)
        text = text.replace("grey ", f"{rng.choice(make_tiny.COLOURS)} " if rng.random() < 0.25 else "")
        texts.append(text if rng.random() < 0.9 else " ")
    return pictures, texts


@torch.no_grad()
def text_velocity(pipe: QwenImage21Pipeline, texts: list[str]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """(noisy latents (B, 16, 64), sigma (B,), row numbers (B,)) to velocities, of captions alone."""
    unique = sorted(set(texts))
    embeds, mask, image_mask = pipe.encode_prompt(unique)  # (U, L, 64), (U, L), (U, L)
    of_row = torch.tensor([unique.index(text) for text in texts], device=embeds.device)

    def velocity(noisy_latents: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        chosen = of_row[rows]
        longest = int(mask[chosen].sum(1).max())
        slots = image_mask.new_ones(len(rows), noisy_latents.shape[1] // 4)
        return pipe.transformer(
            hidden_states=noisy_latents,
            timestep=sigma,
            encoder_hidden_states=embeds[chosen, :longest],
            encoder_hidden_states_mask=mask[chosen, :longest],
            img_shapes=[[(1, 4, 4)]] * len(rows),
            img_mask=torch.cat([image_mask[chosen, :longest], slots], 1),
            return_dict=False,
        )[0][:, -noisy_latents.shape[1] :]

    return velocity


@torch.no_grad()
def copy_velocity(
    pipe: QwenImage21Pipeline, pictures: list[Image.Image], texts: list[str], packed_latents: Tensor
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The same where each row's source image is its own picture."""
    encoded = [
        pipe.encode_prompt(text, image=[picture.convert("RGBA")])
        for text, picture in zip(texts, pictures, strict=True)
    ]
    embeds = torch.cat([prompt for prompt, _, _ in encoded])  # (N, L, 64): instructions are of one length
    image_mask = encoded[0][2]

    def velocity(noisy_latents: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        return pipe.transformer(
            hidden_states=torch.cat([packed_latents[rows], noisy_latents], 1),
            timestep=sigma,
            encoder_hidden_states=embeds[rows],
            img_shapes=[[(1, 4, 4), (1, 4, 4)]] * len(rows),
            img_mask=torch.cat([image_mask, image_mask.new_ones(1, 4)], 1).expand(len(rows), -1),
            return_dict=False,
        )[0][:, -noisy_latents.shape[1] :]

    return velocity


def pretrain_transformer(pipe: QwenImage21Pipeline, steps: int, n_pictures: int, batch_size: int, device: str) -> None:
    """Flow matching on grey objects, and on copies of a source image: a quarter as many."""
    rng = random.Random(SEED + 1)
    grey, captions = grey_captions(n_pictures, rng)
    sources = [one_object_scene(rng, ANY_COLOUR)[0] for _ in range(n_pictures // 4)]
    orders = [f"make the {rng.choice(make_tiny.SHAPES)} {rng.choice(make_tiny.COLOURS)}" for _ in sources]
    pipe.to(device)
    packed_latents = packed_latents_of(pipe, to_tensor(grey + sources, device))  # (N, 16, 64)
    of_text = text_velocity(pipe, captions)
    of_copies = copy_velocity(pipe, sources, orders, packed_latents[len(grey) :])

    def predict(noisy_latents: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        predicted, copies = torch.empty_like(noisy_latents), rows >= len(grey)
        for part, velocity, first in ((~copies, of_text, 0), (copies, of_copies, len(grey))):
            if part.any():
                predicted[part] = velocity(noisy_latents[part], sigma[part], rows[part] - first)
        return predicted

    def shift(u: Tensor) -> Tensor:
        return 1.63 * u / (1 + 0.63 * u)  # as the scheduler does at 16 tokens

    pretraining.train_velocity(pipe.transformer, predict, packed_latents, shift, steps, batch_size)


def pretrain(path: Path, scale: float = 1.0) -> None:
    """Trains the VAE, then the transformer on its latents, and writes both; `scale` shrinks the work for a trial."""
    device = pretraining.seeded_device()
    pipe = make_tiny.build_pipeline(weights=None)
    pretrain_vae(pipe.vae, int(3000 * scale), int(12000 * scale), 16, device)
    pretrain_transformer(pipe, int(3000 * scale), int(4000 * scale), 16, device)
    sharpen_decoder(pipe.vae, int(3000 * scale), int(8000 * scale), 8, device)
    building.save_single_frame_weights(pipe, path)


if __name__ == "__main__":
    args = pretraining.parser_of(__doc__, make_tiny.WEIGHTS).parse_args()
    pretrain(args.weights, args.scale)
