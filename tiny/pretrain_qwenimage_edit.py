"""Pretrains the base of the tiny Qwen-Image-Edit (half an hour on a CPU core).

    python tiny/pretrain_qwenimage_edit.py [--weights FILE] [--scale 0.002]

Its VAE is wired by hand (wiring.py) and its decoder trained in part. Its transformer learns edits that name German
colours, and to leave the picture as it is when an English one is named. The weights go to the recipe's
tiny_weights.safetensors.

The shipped ones were trained on a CPU: the decoder for 500 steps of 8, the transformer for 2600 steps of 16 and then
for 3200 more on other edits. The base then recolours every shape of a picture, also where two stand in it.
"""

import itertools
import random
import sys
import time
from collections.abc import Callable
from multiprocessing import Pool
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from diffusers import AutoencoderKLQwenImage, QwenImageEditPipeline, QwenImageEditPlusPipeline
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate, pad

from tiny import building, pretraining, shapes
from tiny.wiring import LATENT_NOISE, POOLED_LEVELS, Linear, decode_small, latents_of, trained_parameters, wire_vae

make_tiny = pretraining.load_make_tiny("qwenimage_edit")
SIZE, SEED = make_tiny.SIZE, make_tiny.SEED
MODEL_SIZE = 1024  # what the pipelines enlarge a square source to, and the target's: 16 x 16 latents, 64 packed tokens
PLUS_CONDITION_SIZE = 384  # and the plus pipeline's, for the text encoder: 9 tokens

DrawnEdit = tuple[Image.Image, Image.Image, str]  # source, target, instruction


# ---- edits ----


def random_edit(seed: int, named: float = 0.1, empty: float = 0.1) -> DrawnEdit:
    """An edit for the base: a German colour, or (a share `named`) an English one or (a share `empty`) no instruction
    at all, which both leave the picture as it is."""
    rng = random.Random(f"edit {seed}")
    layout = make_tiny.random_layout(rng.choice(make_tiny.SHAPES), rng)
    background, colours = rng.choice(list(shapes.BACKGROUNDS)), rng.choices(make_tiny.COLOURS, k=2)
    edit = make_tiny.Edit("", layout, background, *colours, rng.choice(make_tiny.INSTRUCTIONS))
    source, kind = edit.draw(edit.source), rng.random()
    if kind < named:
        return source, source, edit.text
    if kind < named + empty:
        return source, source, rng.choice(("", " "))
    return source, edit.draw(edit.target), in_german(edit.text)


def in_german(text: str) -> str:
    """The instruction with its colour in German."""
    words = dict(zip(make_tiny.COLOURS, make_tiny.GERMAN, strict=True))
    return " ".join(words.get(word, word) for word in text.split())


def drawn(draw: Callable, n: int) -> list:
    """draw(0), ..., draw(n - 1), on all cores."""
    with Pool() as pool:
        return pool.map(draw, range(n), chunksize=8)


def to_tensor(pictures: list[Image.Image]) -> Tensor:
    """PIL pictures to (N, 3, H, W) uint8."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def resized(pictures: Tensor, size: int) -> Tensor:
    """(N, 3, H, W) uint8 to (N, 3, size, size) float32 in [-1, 1]."""
    pictures = pictures.float()
    if pictures.shape[-1] != size:
        pictures = interpolate(pictures, (size, size), mode="bicubic", antialias=True).clamp(0, 255)
    return pictures / 127.5 - 1


def shrunk(pictures: Tensor) -> Tensor:
    """(N, 3, 512, 512) uint8 to (N, 3, 128, 128) in [-1, 1]: what the encoder sees of them at 1024 x 1024."""
    factor = 2**POOLED_LEVELS * SIZE // MODEL_SIZE
    return torch.cat([avg_pool2d(resized(some, SIZE), factor) for some in pictures.split(64)])


# ---- the decoder ----


@torch.no_grad()
def encode(vae: AutoencoderKLQwenImage, pictures: Tensor, size: int) -> Tensor:
    """(N, 3, H, W) uint8, enlarged to size x size, to latents (N, 16, 1, size/64, size/64), the posterior's mode."""
    return torch.cat([vae.encode(resized(x, size)[:, :, None]).latent_dist.mode() for x in pictures.split(16)])


def pretrain_decoder(
    vae: AutoencoderKLQwenImage, wiring: tuple[Linear, Linear], pictures: Tensor, steps: int, batch_size: int
) -> None:
    """Pictures (N, 3, 512, 512) uint8, an eighth as large, from their noisy latents (L1 + L2), by random quarters."""
    small = shrunk(pictures)
    latents = latents_of(wiring, small)
    std = latents.new_tensor(vae.config.latents_std).view(1, -1, 1, 1)
    optimizer = pretraining.adamw(trained_parameters(vae), "cpu")
    generator = torch.Generator().manual_seed(SEED)
    half = latents.shape[-1] // 2
    for step in range(steps):
        rows = torch.randint(len(pictures), (batch_size,), generator=generator)
        top, left = torch.randint(half + 1, (2,), generator=generator).tolist()
        some = latents[rows, :, top : top + half, left : left + half]
        target = small[rows, :, 8 * top : 8 * (top + half), 8 * left : 8 * (left + half)]
        error = decode_small(vae, (some + LATENT_NOISE * std * torch.randn_like(some))[:, :, None])[:, :, 0] - target
        loss = error.abs().mean() + error.square().mean()
        pretraining.update(optimizer, loss, pretraining.cosine(step, steps, 3e-3))
        if step % 100 == 0 or step == steps - 1:
            print(f"decoder {step}/{steps} psnr {pretraining.psnr(error):.1f}", flush=True)


# ---- the transformer ----


def packed_latents_of(pipe: QwenImageEditPlusPipeline, wiring: tuple[Linear, Linear], pictures: Tensor) -> Tensor:
    """(N, 3, 512, 512) uint8 to normalised packed latents (N, 64, 64) of the pictures at 1024 x 1024."""
    latents = latents_of(wiring, shrunk(pictures))
    latents = latents / latents.new_tensor(pipe.vae.config.latents_std)[:, None, None]  # their mean is 0
    return pipe._pack_latents(latents, len(latents), latents.shape[1], *latents.shape[2:])


@torch.no_grad()
def embeds_of(
    pipe: QwenImageEditPlusPipeline, pictures: Tensor, texts: list[str], plus: bool, batch_size: int = 50
) -> tuple[Tensor, Tensor]:
    """Embeds (N, L, 64) and mask (N, L) of instructions with one source each, as the plus or the edit pipeline makes
    them. The plus pipeline takes one prompt at a time; its template in the edit pipeline gives the same in batches."""
    edit = QwenImageEditPipeline(**pipe.components)
    if plus:
        edit.prompt_template_encode = pipe.prompt_template_encode
        texts = [f"Picture 1: <|vision_start|><|image_pad|><|vision_end|>{text}" for text in texts]
    size, parts = PLUS_CONDITION_SIZE if plus else MODEL_SIZE, []
    for start in range(0, len(texts), batch_size):
        some = slice(start, start + batch_size)
        images = (resized(pictures[some], size) * 127.5 + 127.5).round().byte()
        parts.append(edit._get_qwen_prompt_embeds(texts[some], list(images), pipe.device))
    length = max(mask.shape[1] for _, mask in parts)
    embeds = torch.cat([pad(embeds, (0, 0, 0, length - embeds.shape[1])) for embeds, _ in parts])
    return embeds, torch.cat([pad(mask, (0, length - mask.shape[1])) for _, mask in parts])


def pretrain_transformer(
    pipe: QwenImageEditPlusPipeline,
    wiring: tuple[Linear, Linear],
    edits: list[DrawnEdit],
    steps: int,
    batch_size: int,
) -> None:
    """Flow matching, three steps of four in the plus pipeline's form and one in the edit pipeline's, which is known of
    the first quarter of the edits only."""
    sources, targets = (to_tensor([edit[i] for edit in edits]) for i in (0, 1))
    texts, quarter = [edit[2] for edit in edits], len(edits) // 4
    prompts = {True: embeds_of(pipe, sources, texts, True)}
    prompts[False] = embeds_of(pipe, sources[:quarter], texts[:quarter], False)
    target_latents, source_latents = (packed_latents_of(pipe, wiring, x) for x in (targets, sources))
    sides = (1, MODEL_SIZE // 128, MODEL_SIZE // 128)
    transformer = pipe.transformer.train()
    optimizer = torch.optim.AdamW(transformer.parameters(), weight_decay=0.01)
    generator = torch.Generator().manual_seed(SEED)
    for step in range(steps):
        embeds, mask = prompts[step % 4 > 0]
        rows = torch.randint(len(embeds), (batch_size,), generator=generator)
        latents = target_latents[rows]
        noise = torch.randn(latents.shape, generator=generator)
        u = torch.rand(batch_size, generator=generator)
        sigma = 1.64 * u / (1 + 0.64 * u)  # uniform, shifted as the scheduler does at 64 tokens
        noisy_latents = torch.lerp(latents, noise, sigma[:, None, None])
        velocity_pred = transformer(
            hidden_states=torch.cat([noisy_latents, source_latents[rows]], dim=1),
            timestep=sigma,
            encoder_hidden_states=embeds[rows],
            encoder_hidden_states_mask=mask[rows],
            img_shapes=[[sides, sides]] * batch_size,
            return_dict=False,
        )[0][:, : latents.shape[1]]
        loss = (velocity_pred - (noise - latents)).square().mean()
        pretraining.update(optimizer, loss, pretraining.cosine(step, steps, 2e-3))
        if step % 500 == 0 or step == steps - 1:
            print(f"transformer {step}/{steps} loss {loss.item():.4f}", flush=True)
    transformer.eval()


# ---- what came of it ----


def sample(pipe: QwenImageEditPlusPipeline | QwenImageEditPipeline, source: Image.Image, text: str) -> Image.Image:
    """What the unmodified pipeline makes of a source, always from the same noise."""
    return pipe(
        image=source,
        prompt=text,
        negative_prompt=" ",
        true_cfg_scale=2.0,
        height=MODEL_SIZE,
        width=MODEL_SIZE,
        num_inference_steps=16,
        generator=torch.Generator().manual_seed(SEED),
    ).images[0]


@torch.no_grad()
def report(pipe: QwenImageEditPlusPipeline, edits: list[DrawnEdit]) -> None:
    """Prints what the VAE keeps of targets, and what the base makes of held-out edits, in German and in English."""
    targets = [target for _, target, _ in edits]
    latents = encode(pipe.vae, to_tensor(targets), MODEL_SIZE)
    decoded = torch.cat([pipe.vae.decode(some).sample[:, :, 0] for some in latents.split(8)])
    pictures = pipe.image_processor.postprocess(decoded, output_type="pil")
    print(f"the VAE keeps {sum(map(shapes.same_objects, pictures, targets))} of {len(targets)} pictures", flush=True)
    held_out = list(make_tiny.held_out_edits(random.Random(SEED + 1)))
    sources, targets = ([edit.draw(getattr(edit, name)) for edit in held_out] for name in ("source", "target"))
    edit_pipe = QwenImageEditPipeline(**pipe.components)
    edit_pipe.set_progress_bar_config(disable=True)
    for (name, one), say in itertools.product((("plus", pipe), ("edit", edit_pipe)), (in_german, str)):
        images = [sample(one, source, say(edit.text)) for source, edit in zip(sources, held_out, strict=True)]
        right, left = (sum(map(shapes.same_objects, images, some)) for some in (targets, sources))
        language = "English" if say is str else "German"
        print(f"{name}, {language}: {right} of {len(images)} as asked, {left} left as they were", flush=True)


def pretrain(path: Path, scale: float = 1.0) -> None:
    """Trains the decoder, then the transformer, and writes all weights; `scale` shrinks the work for a trial."""
    torch.manual_seed(SEED)
    started = time.monotonic()

    def stage(name: str) -> None:
        print(f"[{time.monotonic() - started:.0f} s] {name}", flush=True)

    edits = drawn(random_edit, int(2000 * scale))
    targets = to_tensor([target for _, target, _ in edits])
    stage("drawn")
    pipe = make_tiny.build_pipeline(weights=None)
    wiring = wire_vae(pipe.vae, shrunk(targets[:100]))
    pipe.set_progress_bar_config(disable=True)
    building.convolve_single_frames(pipe.vae)
    pretrain_decoder(pipe.vae, wiring, targets, int(800 * scale), 16)
    stage("decoder trained")
    pretrain_transformer(pipe, wiring, edits, int(5000 * scale), 16)
    stage("transformer trained")
    building.save_single_frame_weights(pipe, path)
    report(pipe, edits[:40])
    stage("reported")


if __name__ == "__main__":
    args = pretraining.parser_of(__doc__, make_tiny.WEIGHTS).parse_args()
    pretrain(args.weights, args.scale)
