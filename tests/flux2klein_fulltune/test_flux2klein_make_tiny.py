"""The tiny checkpoint opens with the unmodified pipeline, its VAE reconstructs, its base draws shapes in grey only."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, load_script
from PIL import Image
from safetensors.torch import load_file

from tiny import pretrain_flux2klein, pretraining, shapes

RECIPE = ROOT / "recipes" / "flux2klein_fulltune"
STATES_OF_RED = [-0.3251, 0.9738, 0.7659]  # the first value of the states 9, 18 and 27 of "red" in "a red circle"
TEMPLATE = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def make_tiny():
    return load_script(RECIPE / "make_tiny.py")


@pytest.fixture(scope="module")
def tiny(make_tiny, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    assert make_tiny.make(folder)
    return folder


@pytest.fixture(scope="module")
def pipe(tiny):
    from diffusers import Flux2KleinPipeline

    pipe = Flux2KleinPipeline.from_pretrained(tiny / "model")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pictures(tiny) -> torch.Tensor:
    """60 training pictures, (60, 3, 64, 64) in [-1, 1]."""
    rows = json.loads((tiny / "data/train.json").read_text())[:60]
    return pretraining.to_tensor([Image.open(tiny / "data" / row["file_path"]) for row in rows])


def test_idempotent_and_remade(make_tiny, tiny, monkeypatch):
    index = tiny / "model/model_index.json"
    before = index.stat().st_mtime_ns
    assert not make_tiny.make(tiny)
    assert index.stat().st_mtime_ns == before
    (tiny / "stamp.txt").write_text("of other files")
    monkeypatch.setattr(make_tiny, "build_pipeline", lambda weights: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        make_tiny.make(tiny)
    monkeypatch.undo()
    assert not (tiny / "stamp.txt").exists(), "a killed run must not look finished"
    assert make_tiny.make(tiny) and not make_tiny.make(tiny)


def test_shipped_weights_are_small_and_those_of_the_checkpoint(make_tiny, pipe):
    assert make_tiny.WEIGHTS.stat().st_size <= 4_000_000
    shipped = load_file(make_tiny.WEIGHTS)
    opened = {f"vae.{name}": tensor for name, tensor in pipe.vae.state_dict().items()}
    opened |= {f"transformer.{name}": tensor for name, tensor in pipe.transformer.state_dict().items()}
    assert shipped.keys() == opened.keys()
    for name, tensor in shipped.items():
        torch.testing.assert_close(opened[name].half(), tensor, atol=0, rtol=0, msg=name)


def test_the_classes_and_sizes_are_those_of_klein(tiny, pipe):
    index = json.loads((tiny / "model/model_index.json").read_text())
    assert index["_class_name"] == "Flux2KleinPipeline" and index["is_distilled"] is False
    classes = {name: index[name][1] for name in ("text_encoder", "tokenizer", "transformer", "vae", "scheduler")}
    assert classes == {
        "text_encoder": "Qwen3ForCausalLM",
        "tokenizer": "Qwen2Tokenizer",
        "transformer": "Flux2Transformer2DModel",
        "vae": "AutoencoderKLFlux2",
        "scheduler": "FlowMatchEulerDiscreteScheduler",
    }
    assert not pipe.transformer.config.guidance_embeds
    assert pipe.transformer.config.in_channels == 4 * pipe.vae.config.latent_channels
    assert pipe.text_encoder.config.num_hidden_layers > 27, "state 27 comes before the last norm, as in the real model"


def test_scheduler_is_flux2s(pipe):
    config = pipe.scheduler.config
    assert config.use_dynamic_shifting and config.time_shift_type == "exponential" and config.shift_terminal is None
    assert (config.base_image_seq_len, config.max_image_seq_len) == (256, 4096)
    assert (config.base_shift, config.max_shift, config.shift, config.num_train_timesteps) == (0.5, 1.15, 3.0, 1000)


def test_tokenizer_and_chat_template(tiny, pipe):
    tokenizer = pipe.tokenizer
    render = {"tokenize": False, "add_generation_prompt": True}
    hi = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(hi, **render) == TEMPLATE.format("hi")
    thinking = tokenizer.apply_chat_template(hi, **render, enable_thinking=True)
    assert thinking == TEMPLATE.format("hi"), "only thinking that is switched off is written down, as an empty thought"
    without = tokenizer.apply_chat_template(hi, **render, enable_thinking=False)
    assert without == TEMPLATE.format("hi") + "<think>\n\n</think>\n\n"

    rows = json.loads((tiny / "data/train.json").read_text()) + json.loads((tiny / "data/validation.json").read_text())
    for text in {row["text"] for row in rows} | set(pretrain_flux2klein.plain_captions()):
        words = text.replace(",", " ,").split()
        assert len(tokenizer(text).input_ids) == len(words), f"one token a word: {tokenizer.tokenize(text)}"
        prompt = TEMPLATE.format(text) + "<think>\n\n</think>\n\n"
        assert len(tokenizer(prompt).input_ids) == 12 + len(words) <= pretrain_flux2klein.MAX_SEQUENCE_LENGTH
    for text in ("a red circle on the left", "Größe: 3 Hüte\n\n", "don't  redden 雪"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_text_encoder_is_the_one_that_the_base_was_trained_on(pipe):
    with torch.no_grad():
        embeds, txt_ids = pipe.encode_prompt(["a red circle", "a blue circle", ""], max_sequence_length=32)
    assert embeds.shape == (3, 32, 96) and txt_ids.shape == (3, 32, 4)
    states = embeds.view(3, 32, 3, 32)  # (prompt, token, layer, channel)
    distance = (states[0] - states[1]).norm(dim=-1)  # (token, layer)
    assert (distance[:4] < 1e-3).all(), "the tokens before the colour do not know it"
    assert (distance[4] > 5).all() and (distance[4] > 2 * distance[5:].amax(0)).all(), "its own token says it best"
    for a, b in ((0, 1), (1, 2)):
        change = (states[:, :, a] - states[:, :, b]).norm(dim=-1) / states[:, :, a].norm(dim=-1)
        assert change.mean() > 0.3, "the three layers say different things"
    torch.testing.assert_close(states[0, 4, :, 0], torch.tensor(STATES_OF_RED), atol=2e-4, rtol=0)


def test_data(make_tiny, tiny):
    data = tiny / "data"
    train, held_out = (json.loads((data / f"{name}.json").read_text()) for name in ("train", "validation"))
    pairs = {shapes.read_caption(row["text"])[0][0][:2] for row in train}
    assert pairs == {(c, s) for c in make_tiny.COLOURS for s in make_tiny.SHAPES} - set(make_tiny.HELD_OUT)
    assert {shapes.read_caption(row["text"])[0][0][:2] for row in held_out} == set(make_tiny.HELD_OUT)
    assert (data / "validation_prompts.txt").read_text().splitlines() == [row["text"] for row in held_out]
    assert len({row["text"] for row in held_out}) == len(held_out) == 10 and len(train) == 400
    for row in held_out + train[::20]:
        assert shapes.shows(Image.open(data / row["file_path"]), row["text"], check_place=True), row


def test_vae_reconstructs(tiny, pipe, pictures):
    """Through the pipeline's own steps: patchify, normalise, and back; the batch norm's statistics are real."""
    rows = json.loads((tiny / "data/train.json").read_text())[: len(pictures)]
    with torch.no_grad():
        normalised = pipe._encode_vae_image(pictures, generator=None)  # (60, 32, 4, 4)
        scale = torch.sqrt(pipe.vae.bn.running_var + pipe.vae.config.batch_norm_eps).view(1, -1, 1, 1)
        patches = normalised * scale + pipe.vae.bn.running_mean.view(1, -1, 1, 1)
        reconstructions = pipe.vae.decode(pipe._unpatchify_latents(patches)).sample.clamp(-1, 1)
    assert normalised.mean().abs() < 0.4 and 0.6 < normalised.std() < 1.4
    spread = normalised.std((0, 2, 3))
    assert spread.min() > 0.3 and spread.max() < 2, "every channel is normalised by its own statistics"
    psnr = -10 * ((reconstructions - pictures) / 2).square().mean((1, 2, 3)).log10()
    assert psnr.mean() > 30, psnr.mean()
    drawn = pipe.image_processor.postprocess(reconstructions)
    right = [shapes.shows(p, row["text"], check_place=True) for p, row in zip(drawn, rows, strict=True)]
    assert np.mean(right) >= 0.95, right


def test_pretraining_sees_the_latents_that_the_pipeline_makes(pipe, pictures):
    """Same patches, same normalisation (with its eps), same order of tokens."""
    with torch.no_grad():
        expected = pipe._pack_latents(pipe._encode_vae_image(pictures[:4], generator=None))  # (4, 16, 32)
        torch.testing.assert_close(pretrain_flux2klein.packed_latents_of(pipe, pictures[:4]), expected)


def test_base_draws_shapes_but_no_colours(tiny, pipe):
    prompts = (tiny / "data/validation_prompts.txt").read_text().splitlines()
    drawn = pretrain_flux2klein.sample(pipe, prompts)
    assert sum(shapes.shows(p, text) for p, text in zip(drawn, prompts, strict=True)) <= 2
    assert {item.colour for p in drawn for item in shapes.find_shapes(p)} == {"grey"}
    background = [shapes.find_background(p) == shapes.read_caption(t)[1] for p, t in zip(drawn, prompts, strict=True)]
    assert sum(background) >= 9
    plain = pretrain_flux2klein.plain_captions()
    right = [
        shapes.shows(p, t, check_place=True)
        for p, t in zip(pretrain_flux2klein.sample(pipe, plain), plain, strict=True)
    ]
    assert np.mean(right) >= 0.8, right


@pytest.mark.slow
def test_pretraining_writes_weights_that_make_reads(make_tiny, tmp_path, capsys):
    """A trial of a few steps: all stages run, and their result is what the checkpoint holds."""
    weights = tmp_path / "weights.safetensors"
    pretrain_flux2klein.pretrain(weights, scale=0.001)
    assert make_tiny.make(tmp_path / "tiny", weights) and not make_tiny.make(tmp_path / "tiny", weights)
    from diffusers import Flux2KleinPipeline

    pipe = Flux2KleinPipeline.from_pretrained(tmp_path / "tiny/model")
    torch.testing.assert_close(pipe.vae.bn.running_mean.half(), load_file(weights)["vae.bn.running_mean"])
    assert pipe.vae.bn.running_mean.abs().max() > 0
    output = capsys.readouterr().out
    assert all(f"{stage} 0/" in output for stage in ("vae", "transformer", "decoder")), output
