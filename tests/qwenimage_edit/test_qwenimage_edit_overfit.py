"""A transformer trained by the recipe's compute_loss on two edits makes them from pure noise through the unmodified
pipelines: told apart by their instructions, or by their sources alone."""

import json
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImageTransformer2DModel,
)
from PIL import Image

from tiny import shapes

pytestmark = pytest.mark.slow

WIDTH, HEIGHT = 512, 256  # of targets
STEPS, BATCH = 240, 8
TEXTS = ["make the circle red", "turn the cross blue"]


def scene(colour: str, shape: str, place: str, background: str) -> Image.Image:
    box = shapes.place_box(place, (WIDTH, HEIGHT), 150)
    return shapes.draw([shapes.Found(colour, shape, box)], background, (WIDTH, HEIGHT))


TARGETS = [scene("red", "circle", "on the left", "white"), scene("blue", "cross", "on the right", "black")]
SOURCES = [Image.new("RGB", (64, 64), "orange"), Image.new("RGB", (256, 64), "navy")]  # of two sizes


@pytest.fixture(scope="module", params=["plus-instructions", "plus-sources", "edit-instructions", "edit-sources"])
def trained(request, train, settings, encoding, model_folder) -> SimpleNamespace:
    """The pipeline with the overfitted transformer, what it is to be asked for, and each target's normalised latents,
    encoded by diffusers' own means."""
    mode, told_by = request.param.split("-")
    torch.manual_seed(0)
    edges = json.loads((model_folder / "transformer/config.json").read_text())
    transformer = QwenImageTransformer2DModel(
        in_channels=edges["in_channels"], out_channels=edges["out_channels"], num_layers=2, attention_head_dim=32,
        num_attention_heads=4, joint_attention_dim=edges["joint_attention_dim"], axes_dims_rope=(8, 12, 12),
    )  # fmt: skip
    pipeline_class = QwenImageEditPlusPipeline if mode == "plus" else QwenImageEditPipeline
    pipeline = pipeline_class.from_pretrained(model_folder, transformer=transformer)
    pipeline.set_progress_bar_config(disable=True)
    train_mode = "qwen_image_edit_plus" if mode == "plus" else "qwen_image_edit"
    cfg = settings(caption_dropout=0, uniform_sampling=True, mixed_precision="no", train_mode=train_mode)
    encoders = encoding.Encoders(cfg, model_folder, torch.device("cpu"), torch.float32)
    models = train.Models(
        transformer=transformer,
        config=json.loads(transformer.to_json_string()),
        scheduler_config=FlowMatchEulerDiscreteScheduler.load_config(model_folder / "scheduler"),
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    asked, samples, expected = [], [], []
    for number, target in enumerate(TARGETS):
        text = TEXTS[number if told_by == "instructions" else 0]
        source = SOURCES[number if told_by == "sources" else 0]
        asked.append({"prompt": text, "image": [source] if mode == "plus" else source})
        width, height = encoding.source_size(source.size)
        pixels = pipeline.image_processor.preprocess(source, height, width)[0]
        (latents,) = encoders.latents(encoding.image_to_tensor(target)[None], moments=False)["latents"]
        (of_source,) = encoders.latents(pixels[None], moments=False)["latents"]
        instruction = encoding.Instruction(text, [source])
        (prompt_embeds,) = encoders.encode([instruction], {"sources": [[source]]})["prompt_embeds"]
        samples.append({"prompt_embeds": prompt_embeds, "latents": latents, "source_0": of_source})
        with torch.no_grad():
            pixels = pipeline.image_processor.preprocess(target)[:, :, None]
            expected.append(pipeline._encode_vae_image(pixels, generator=None)[0])
    optimizer = torch.optim.AdamW(transformer.parameters(), weight_decay=0.0)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1, step / 20) * (1 - step / STEPS)
        for which in (0, 1):  # sources of different sizes do not share a micro-batch
            positions = range(which * BATCH // 2, (which + 1) * BATCH // 2)
            rows = [{**samples[which], "step": step, "position": at, "group_size": BATCH} for at in positions]
            loss, _ = train.compute_loss(models, train.loader.collate(rows), cfg)
            (loss / 2).backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    print(f"last loss {loss.item():.4f}")
    return SimpleNamespace(pipeline=pipeline, asked=asked, expected=expected)


def draw(trained: SimpleNamespace, number: int, seed: int) -> torch.Tensor:
    """Normalised latents (16, 1, H/64, W/64) that the unmodified pipeline makes of noise."""
    packed = trained.pipeline(
        **trained.asked[number],
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=20,
        true_cfg_scale=1.0,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
    ).images
    return trained.pipeline._unpack_latents(packed, HEIGHT, WIDTH, trained.pipeline.vae_scale_factor)[0]


@pytest.mark.parametrize("number", [0, 1])
def test_targets_come_back_from_noise(trained, number):
    """Catches a wrong sign, scale, packing, template or normalisation anywhere between training and editing, and
    sources that do not reach the transformer or are taken for the target.

    Not a wrong timestep: the model can read the noise level off its input. test_qwenimage_edit_parity has it.
    """
    expected, other = trained.expected[number], trained.expected[1 - number]
    for seed in (0, 1):
        latents = draw(trained, number, seed)
        error = (latents - expected).norm() / expected.norm()
        print(f"relative error {error:.3f}, to the other target {(latents - other).norm() / other.norm():.3f}")
        assert error < 0.35
