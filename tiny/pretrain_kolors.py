"""Pretrains the base of the tiny Kolors (minutes on a GPU).

    python tiny/pretrain_kolors.py [--weights FILE] [--scale 0.001]
    python tiny/pretrain_kolors.py --anneal   goes on at a falling learning rate (a quarter of an hour on a CPU)

Its VAE learns to reconstruct drawings, its UNet to draw what captions name, anywhere. The weights go to the recipe's
tiny_weights.safetensors. The shipped ones: the last stage was stopped after 2125 of its 6000 steps, then --anneal.
"""

import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from diffusers import AutoencoderKL, KolorsPipeline
from PIL import Image
from torch import Tensor

from tiny import building, pretraining, shapes

make_tiny = pretraining.load_make_tiny("kolors_spatial_adapter")
SIZE, SEED = make_tiny.SIZE, make_tiny.SEED
INFERENCE_STEPS = 16  # that the base is tried with
LATENT_NOISE = 0.2


def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """(B, 4, h, w), not scaled, to (B, 3, 4h, 4w)."""
    return vae.decode(latents).sample


def pretrain_vae(vae: AutoencoderKL, steps: int, n_pictures: int, batch_size: int, device: str) -> None:
    """On random scenes; then measures the scaling factor."""
    rng, counts = random.Random(SEED), (0, 1, 1, 2, 2, 3)
    scenes = [pretraining.random_scene(rng, SIZE, counts, make_tiny.draw_extent) for _ in range(n_pictures)]
    pictures = pretraining.to_tensor(scenes).to(device)  # (N, 3, 64, 64)
    pretraining.train_autoencoder(
        vae, lambda latents: decode(vae, latents), pictures, steps, batch_size, LATENT_NOISE, penalty=1e-2, peak=3e-3
    )
    latents = pretraining.encode(vae, pictures[:1024])
    print(f"latents: mean {latents.mean((0, 2, 3)).tolist()}, std {latents.std((0, 2, 3)).tolist()}", flush=True)
    vae.register_to_config(scaling_factor=1 / latents.std().item())


@torch.no_grad()
def encode_texts(pipe: KolorsPipeline, texts: list[str]) -> tuple[Tensor, Tensor]:
    """(N, 256, 48) and (N, 48), as the pipeline encodes prompts."""
    parts = [
        pipe.encode_prompt(texts[start : start + 64], do_classifier_free_guidance=False)
        for start in range(0, len(texts), 64)
    ]
    return torch.cat([part[0] for part in parts]), torch.cat([part[2] for part in parts])


def pretrain_unet(
    pipe: KolorsPipeline, pictures: Tensor, texts: list[str], steps: int, batch_size: int, peak: float = 2e-3
) -> None:
    """Predicts the noise of drawn layouts from their captions, a tenth of them empty, in the scheduler's own mixture.

    pictures: (N, 3, 64, 64) in [-1, 1], on the device to train on.
    """
    device = pictures.device
    latents = pretraining.encode(pipe.vae, pictures) * pipe.vae.config.scaling_factor  # (N, 4, 16, 16)
    unique = ["", *sorted(set(texts))]
    place = {text: number for number, text in enumerate(unique)}
    text_rows = torch.tensor([place[text] for text in texts], device=device)
    prompt_embeds, pooled = encode_texts(pipe, unique)  # (U, 256, 48), (U, 48)
    time_ids = torch.tensor([SIZE, SIZE, 0, 0, SIZE, SIZE], device=device).float().expand(batch_size, 6)
    alphas_cumprod = pipe.scheduler.alphas_cumprod.to(device)  # (1100,)
    optimizer = pretraining.adamw(pipe.unet.train().parameters(), device)
    generator = torch.Generator(device).manual_seed(SEED)
    for step, rows in pretraining.batches(len(latents), batch_size, steps, device):
        noise = torch.randn(batch_size, *latents.shape[1:], generator=generator, device=device)
        timestep = torch.randint(len(alphas_cumprod), (batch_size,), generator=generator, device=device)
        alpha = alphas_cumprod[timestep][:, None, None, None]
        kept = torch.rand(batch_size, generator=generator, device=device) >= 0.1
        text = text_rows[rows] * kept  # row 0 is the empty caption
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            noise_pred = pipe.unet(
                alpha.sqrt() * latents[rows] + (1 - alpha).sqrt() * noise,
                timestep,
                encoder_hidden_states=prompt_embeds[text],
                added_cond_kwargs={"text_embeds": pooled[text], "time_ids": time_ids},
            ).sample
        loss = (noise_pred.float() - noise).square().mean()
        pretraining.update(optimizer, loss, pretraining.cosine(step, steps, peak))
        if step % 250 == 0:
            print(f"unet {step}/{steps} loss {loss.item():.4f}", flush=True)
    pipe.unet.eval()


def sample(pipe: KolorsPipeline, prompts: list[str], guidance_scale: float = 3.0) -> list[Image.Image]:
    """What the unmodified pipeline draws, one seed a prompt."""
    return pipe(
        prompts,
        height=SIZE,
        width=SIZE,
        num_inference_steps=INFERENCE_STEPS,
        guidance_scale=guidance_scale,
        generator=[torch.Generator().manual_seed(i) for i in range(len(prompts))],
    ).images


def shows(picture: Image.Image, objects: list[dict]) -> bool:
    """True when the picture holds exactly the objects of a layout's row, wherever they are."""
    found = sorted(f"{item.colour} {item.shape}" for item in shapes.find_shapes(picture))
    return found == sorted(item["phrase"] for item in objects)


def draw_layouts(count: int, rng: random.Random) -> tuple[list[Image.Image], list[dict]]:
    """Pictures and their rows."""
    return zip(*(make_tiny.draw_layout(rng, make_tiny.count_of(i)) for i in range(count)), strict=True)


def print_right(pipe: KolorsPipeline, rng: random.Random, count: int) -> None:
    """How many captions the base draws."""
    pipe.set_progress_bar_config(disable=True)
    _, layouts = draw_layouts(count, rng)
    for guidance_scale in (1.0, 2.0, 3.0, 5.0):
        drawn = sample(pipe, [row["text"] for row in layouts], guidance_scale)
        right = sum(shows(picture, row["objects"]) for picture, row in zip(drawn, layouts, strict=True))
        print(f"the base draws {right} of {len(layouts)} captions at guidance {guidance_scale}", flush=True)


def save_weights(pipe: KolorsPipeline, path: Path) -> None:
    """The VAE and the UNet in float16, and the VAE's scaling factor."""
    scaling_factor = torch.tensor(pipe.vae.config.scaling_factor)
    building.save_small({**building.half_of(pipe, "vae", "unet"), "scaling_factor": scaling_factor}, path)


def pretrain(path: Path, scale: float = 1.0) -> None:
    """Trains the VAE, then the UNet on its latents, and writes both; `scale` shrinks the work for a trial."""
    device = pretraining.seeded_device()
    start = time.perf_counter()
    pipe = make_tiny.build_pipeline(weights=None).to(device)
    pretrain_vae(pipe.vae, int(4000 * scale), int(16000 * scale), 64, device)
    print(f"{time.perf_counter() - start:.0f} s: the VAE", flush=True)
    rng = random.Random(SEED + 1)
    drawn, rows = draw_layouts(int(32000 * scale), rng)
    pictures = pretraining.to_tensor(drawn).to(device)
    pretraining.sharpen_decoder(
        pipe.vae, lambda latents: decode(pipe.vae, latents), pictures, int(2000 * scale), 64, LATENT_NOISE
    )
    print(f"{time.perf_counter() - start:.0f} s: its decoder", flush=True)
    pretrain_unet(pipe, pictures, [row["text"] for row in rows], int(6000 * scale), 256)
    print(f"{time.perf_counter() - start:.0f} s: the UNet", flush=True)
    save_weights(pipe, path)
    print_right(pipe, rng, min(48, int(48 * scale) + 2))


def anneal(path: Path, scale: float = 1.0) -> None:
    """Trains the UNet of a weights file a little more, its learning rate falling to zero, and writes it back: what a
    pretraining lacks that was stopped early."""
    pipe = make_tiny.build_pipeline(path)
    rng = random.Random(SEED + 2)
    drawn, rows = draw_layouts(int(8000 * scale), rng)
    pretrain_unet(pipe, pretraining.to_tensor(drawn), [row["text"] for row in rows], int(1500 * scale), 32, peak=5e-4)
    save_weights(pipe, path)
    print_right(pipe, rng, min(48, int(48 * scale) + 2))


if __name__ == "__main__":
    parser = pretraining.parser_of(__doc__, make_tiny.WEIGHTS)
    parser.add_argument("--anneal", action="store_true", help="train the base of the weights file a little more")
    args = parser.parse_args()
    (anneal if args.anneal else pretrain)(args.weights, args.scale)
