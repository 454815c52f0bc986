"""The tiny checkpoint opens with the unmodified pipeline, its VAE reconstructs, its base draws shapes in grey only."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tiny import pretrain_qwenimage, pretraining, shapes

RECIPE = Path(__file__).parents[1] / "recipes" / "qwenimage_fulltune"
EMBEDDING_OF_RED = [-1.2763, 0.7096, -0.6024, 1.6712]  # the first values of "red" in "a red circle"


@pytest.fixture(scope="module")
def make_tiny():
    spec = importlib.util.spec_from_file_location("qwenimage_make_tiny", RECIPE / "make_tiny.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tiny(make_tiny, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    assert make_tiny.make(folder)
    return folder


@pytest.fixture(scope="module")
def pipe(tiny):
    from diffusers import QwenImagePipeline

    pipe = QwenImagePipeline.from_pretrained(tiny / "model")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe, prompts: list[str]) -> list[Image.Image]:
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    negative = [""] * len(prompts)
    sizes = {"height": 64, "width": 64, "num_inference_steps": 16}
    return pipe(prompts, negative_prompt=negative, true_cfg_scale=2.5, generator=generators, **sizes).images


def test_idempotent_and_remade(make_tiny, tiny, monkeypatch):
    before = (tiny / "model/model_index.json").stat().st_mtime_ns
    assert not make_tiny.make(tiny)
    assert (tiny / "model/model_index.json").stat().st_mtime_ns == before
    (tiny / "stamp.txt").write_text("of other files")
    monkeypatch.setattr(make_tiny, "build_pipeline", lambda weights: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        make_tiny.make(tiny)
    monkeypatch.undo()
    assert not (tiny / "stamp.txt").exists(), "a killed run must not look finished"
    assert make_tiny.make(tiny) and not make_tiny.make(tiny)


def test_shipped_weights_are_small(make_tiny):
    assert make_tiny.WEIGHTS.stat().st_size <= 4_000_000


def test_prompt_template_and_tokenizer(pipe):
    tokenizer = pipe.tokenizer
    assert type(tokenizer).__name__ == "Qwen2Tokenizer"
    template = pipe.prompt_template_encode.split("{}")[0]
    assert len(tokenizer(template).input_ids) == pipe.prompt_template_encode_start_idx == 34
    caption = "a red circle on the left, on a white background"
    assert tokenizer.tokenize(caption)[:3] == ["a", "\u0120red", "\u0120circle"]
    for text in (caption, "Größe: 3 Hüte\n\n", "don't  redden 雪"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    messages = [{"role": "user", "content": "hi"}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    for token in ("<|im_start|>", "<|image_pad|>", "<|vision_start|>"):
        assert len(tokenizer(token).input_ids) == 1


def test_text_encoder_is_the_one_that_the_base_was_trained_on(pipe):
    with torch.no_grad():
        embeds, mask = pipe.encode_prompt(["a red circle", "a blue circle", ""])
    assert embeds.shape == (3, 8, 64) and mask.sum(1).tolist() == [8, 8, 5]
    distance = (embeds[0] - embeds[1]).norm(dim=-1)
    assert distance[1] > 5 and distance[0] < 1e-3, (
        "the colour's own token differs most, the tokens before it not at all"
    )
    expected = torch.tensor(EMBEDDING_OF_RED)
    torch.testing.assert_close(embeds[0, 1, : len(expected)], expected, atol=2e-4, rtol=0)


def test_scheduler_is_qwens(pipe):
    config = pipe.scheduler.config
    assert config.use_dynamic_shifting and config.shift_terminal == 0.02 and config.time_shift_type == "exponential"
    assert (config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift) == (
        256,
        8192,
        0.5,
        0.9,
    )


def test_data(make_tiny, tiny):
    data = tiny / "data"
    train, held_out = (json.loads((data / f"{name}.json").read_text()) for name in ("train", "validation"))
    pairs = {shapes.read_caption(row["text"])[0][0][:2] for row in train}
    assert pairs == {(c, s) for c in make_tiny.COLOURS for s in make_tiny.SHAPES} - set(make_tiny.HELD_OUT)
    assert {shapes.read_caption(row["text"])[0][0][:2] for row in held_out} == set(make_tiny.HELD_OUT)
    assert (data / "validation_prompts.txt").read_text().splitlines() == [row["text"] for row in held_out]
    assert len({row["text"] for row in held_out}) == len(held_out) == 10
    for row in held_out + train[::20]:
        assert shapes.shows(Image.open(data / row["file_path"]), row["text"], check_place=True), row


def test_vae_reconstructs(tiny, pipe):
    rows = json.loads((tiny / "data/train.json").read_text())[:60]
    pictures = [Image.open(tiny / "data" / row["file_path"]) for row in rows]
    x = pretraining.to_tensor(pictures)[:, :, None]  # (60, 3, 1, 64, 64)
    with torch.no_grad():
        latents = pipe.vae.encode(x).latent_dist.mode()
        y = pipe.vae.decode(latents).sample
    psnr = -10 * ((y - x) / 2).square().mean((1, 2, 3, 4)).log10()
    assert psnr.mean() > 24, psnr.mean()
    pictures = [Image.fromarray(p) for p in ((y[:, :, 0].permute(0, 2, 3, 1).numpy() + 1) * 127.5).astype(np.uint8)]
    right = np.mean([shapes.shows(p, row["text"], check_place=True) for p, row in zip(pictures, rows, strict=True)])
    assert right >= 0.95, right
    mean, std = (torch.tensor(pipe.vae.config[name]).view(1, 16, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    normalised = (latents - mean) / std
    assert normalised.mean().abs() < 0.4 and 0.6 < normalised.std() < 1.4


def test_base_draws_shapes_but_no_colours(tiny, pipe):
    prompts = (tiny / "data/validation_prompts.txt").read_text().splitlines()
    pictures = sample(pipe, prompts)
    assert sum(shapes.shows(p, text) for p, text in zip(pictures, prompts, strict=True)) <= 3
    background = [
        shapes.find_background(p) == shapes.read_caption(t)[1] for p, t in zip(pictures, prompts, strict=True)
    ]
    assert sum(background) >= 9
    plain = [
        shapes.caption([shapes.Found("grey", shape, shapes.place_box(place, (64, 64), 27))], "white", colours=False)
        for shape in ("circle", "square", "triangle", "cross")
        for place in shapes.PLACES
    ]
    right = [shapes.shows(p, text, check_place=True) for p, text in zip(sample(pipe, plain), plain, strict=True)]
    assert np.mean(right) >= 0.8, right


def test_pretraining_writes_weights_that_make_reads(make_tiny, tmp_path, capsys):
    """A trial of a few steps: all stages run, and their result is what the checkpoint holds."""
    weights = tmp_path / "weights.safetensors"
    pretrain_qwenimage.pretrain(weights, scale=0.001)
    assert make_tiny.make(tmp_path / "tiny", weights) and not make_tiny.make(tmp_path / "tiny", weights)
    from diffusers import QwenImagePipeline

    pipe = QwenImagePipeline.from_pretrained(tmp_path / "tiny/model")
    stored = load_file(weights)
    torch.testing.assert_close(pipe.transformer.img_in.weight.half(), stored["transformer.img_in.weight"])
    assert pipe.vae.config.latents_std == stored["latents_std"].tolist() != [1.0] * 16
    output = capsys.readouterr().out
    assert all(f"{stage} 0/" in output for stage in ("vae", "transformer", "decoder")), output
