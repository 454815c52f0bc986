"""The tiny checkpoint opens with the unmodified pipeline, its VAE reconstructs, its base draws what captions name,
anywhere."""

import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT
from PIL import Image
from safetensors.torch import load_file

from tiny import pretrain_kolors, pretraining, shapes

RECIPE = ROOT / "recipes" / Path(__file__).parent.name
IDS_OF_WORDS = {"a": 260, "and": 270, ",": 273, "background": 280, "circle": 296, "red": 317, "blue": 321}
STATE_OF_RED = [0.3762, -1.0365, 1.8411, 1.6253]  # the first values of its prompt embedding in "a red circle"
POOLED = [0.3365, -0.6325, -0.2940, -2.1345]  # and of that caption's pooled embedding


@pytest.fixture(scope="module")
def tiny(make_tiny, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    assert make_tiny.make(folder)
    return folder


@pytest.fixture(scope="module")
def pipe(tiny):
    from diffusers import KolorsPipeline

    pipe = KolorsPipeline.from_pretrained(tiny / "model")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def rows(tiny) -> dict[str, list[dict]]:
    return {
        name: [json.loads(line) for line in (tiny / f"data/{name}.jsonl").read_text().splitlines()]
        for name in ("train", "validation")
    }


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
    opened |= {f"unet.{name}": tensor for name, tensor in pipe.unet.state_dict().items()}
    assert shipped.pop("scaling_factor").item() == pytest.approx(pipe.vae.config.scaling_factor)
    assert shipped.keys() == opened.keys()
    for name, tensor in shipped.items():
        torch.testing.assert_close(opened[name].half(), tensor, atol=0, rtol=0, msg=name)


def test_the_classes_and_shape_are_those_of_kolors(tiny, pipe):
    index = json.loads((tiny / "model/model_index.json").read_text())
    assert index["_class_name"] == "KolorsPipeline" and index["force_zeros_for_empty_prompt"] is False
    classes = {name: index[name][1] for name in ("text_encoder", "tokenizer", "unet", "vae", "scheduler")}
    assert classes == {
        "text_encoder": "ChatGLMModel",
        "tokenizer": "ChatGLMTokenizer",
        "unet": "UNet2DConditionModel",
        "vae": "AutoencoderKL",
        "scheduler": "EulerDiscreteScheduler",
    }
    config = pipe.unet.config
    assert (
        config.encoder_hid_dim_type == "text_proj" and config.encoder_hid_dim == pipe.text_encoder.config.hidden_size
    )
    assert config.addition_embed_type == "text_time" and config.use_linear_projection
    assert config.down_block_types[0] == "DownBlock2D" and config.up_block_types[-1] == "UpBlock2D"
    attentions = {name: m.to_q.in_features for name, m in pipe.unet.named_modules() if name.endswith(".attn2")}
    assert len(attentions) >= 5 and pipe.vae.config.latent_channels == config.in_channels == 4


def test_scheduler_is_kolors(pipe):
    config = pipe.scheduler.config
    assert (config.num_train_timesteps, config.beta_schedule) == (1100, "scaled_linear")
    assert (config.beta_start, config.beta_end, config.prediction_type) == (0.00085, 0.014, "epsilon")


def test_tokenizer(tiny, pipe, rows):
    tokenizer = pipe.tokenizer
    front = tokenizer.get_prefix_tokens()
    for word, number in IDS_OF_WORDS.items():
        assert tokenizer(word).input_ids == [*front, number], "the text encoder's weights go by a word's number"
    for text in {row["text"] for some in rows.values() for row in some}:
        assert len(tokenizer(text).input_ids) == 2 + len(text.replace(",", " ,").split()), "one token a word"
    padded = tokenizer("a red circle", padding="max_length", max_length=8)
    assert padded.input_ids[:3] == [0, 0, 0] and padded.attention_mask == [0] * 3 + [1] * 5
    assert padded.position_ids == [0] * 3 + list(range(5))
    for text in ("Größe: 3 Hüte", "一只红色的猫"):
        assert tokenizer.decode(tokenizer(text).input_ids[2:]).strip() == text, "other letters are spelled as bytes"


def test_text_encoder_is_the_one_that_the_base_was_trained_on(pipe):
    prompt_embeds, pooled = pretrain_kolors.encode_texts(pipe, ["a red circle", "a blue circle", ""])
    assert prompt_embeds.shape == (3, 256, 48) and pooled.shape == (3, 48)
    distance = (prompt_embeds[0] - prompt_embeds[1]).norm(dim=-1)  # (256,)
    assert (distance[-5:-2] < 1e-3).all(), "the tokens before the colour do not know it"
    assert distance[-2] > 5 and distance[-2] > 2 * distance[-1], "its own token says it best"
    assert (pooled[0] - pooled[1]).norm() > 0.5, "the last token says it, too"
    torch.testing.assert_close(prompt_embeds[0, -2, :4], torch.tensor(STATE_OF_RED), atol=2e-4, rtol=0)
    torch.testing.assert_close(pooled[0, :4], torch.tensor(POOLED), atol=2e-4, rtol=0)


def test_data(make_tiny, tiny, rows):
    assert len(rows["train"]) == make_tiny.N_TRAIN and len(rows["validation"]) == make_tiny.N_HELD_OUT
    prompts = (tiny / "data/validation_prompts.txt").read_text().splitlines()
    assert prompts == [row["text"] for row in rows["validation"]]
    layouts = [json.dumps(row["objects"]) for some in rows.values() for row in some]
    assert len(set(layouts)) == len(layouts), "held-out layouts are in no training row"
    counts = Counter(len(row["objects"]) for row in rows["validation"])
    assert counts.keys() == {1, 2} and min(counts.values()) == 8
    for row in rows["validation"] + rows["train"][::20]:
        assert not any(place in row["text"] for place in ("left", "right", "top", "bottom", "centre"))
        picture = Image.open(tiny / "data" / row["file_path"])
        assert picture.size == (row["width"], row["height"]) and pretrain_kolors.shows(picture, row["objects"])
        found = {f"{item.colour} {item.shape}": item.bbox for item in shapes.find_shapes(picture)}
        for item in row["objects"]:
            assert f"a {item['phrase']}" in row["text"]
            expected = [value * make_tiny.SIZE for value in item["bbox"]]
            assert found[item["phrase"]] == pytest.approx(expected, abs=2), "boxes are where things are"


def test_boxes_fill_the_picture(make_tiny):
    """Any place, and sides of any length between the two bounds: nothing that a layout says can be guessed."""
    rng = random.Random(1)
    boxes = np.array([box for i in range(500) for box in make_tiny.draw_boxes(rng, 1 + i % 2)])  # (N, 4)
    centres, sides = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    assert boxes.min() >= 3 and boxes.max() < make_tiny.SIZE - 2.99
    assert (centres.std(0) > 8).all() and sides.min() > 14.99 and sides.max() < 30.01 and (sides.std(0) > 2.5).all()


def test_vae_reconstructs(tiny, pipe, rows):
    pictures = [Image.open(tiny / "data" / row["file_path"]) for row in rows["train"][:60]]
    x = pretraining.to_tensor(pictures)  # (60, 3, 64, 64)
    latents = pretraining.encode(pipe.vae, x) * pipe.vae.config.scaling_factor  # (60, 4, 16, 16)
    assert latents.shape == (60, 4, 16, 16) and latents.mean().abs() < 0.4 and 0.7 < latents.std() < 1.4
    with torch.no_grad():
        y = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample.clamp(-1, 1)
    psnr = -10 * ((y - x) / 2).square().mean((1, 2, 3)).log10()
    assert psnr.mean() > 28, psnr.mean()
    drawn = pipe.image_processor.postprocess(y)
    right = [pretrain_kolors.shows(p, row["objects"]) for p, row in zip(drawn, rows["train"], strict=False)]
    assert np.mean(right) >= 0.95, right


@pytest.mark.slow
def test_base_draws_what_captions_name_anywhere(pipe, rows):
    """Catches a base that cannot draw, and one that knows or guesses the held-out boxes."""
    some = rows["validation"]
    drawn = pretrain_kolors.sample(pipe, [row["text"] for row in some])
    found = [{f"{item.colour} {item.shape}" for item in shapes.find_shapes(picture)} for picture in drawn]
    named = [item["phrase"] in names for names, row in zip(found, some, strict=True) for item in row["objects"]]
    right = [pretrain_kolors.shows(picture, row["objects"]) for picture, row in zip(drawn, some, strict=True)]
    print(f"{np.mean(named):.2f} of the objects, {np.mean(right):.2f} of the captions")
    assert np.mean(named) >= 0.45 and np.mean(right) >= 0.3, "chance is below 0.1"
    background = [shapes.find_background(p) in row["text"] for p, row in zip(drawn, some, strict=True)]
    assert np.mean(background) >= 0.95
    text = [some[0]["text"]] * 12
    found = [item for picture in pretrain_kolors.sample(pipe, text) for item in shapes.find_shapes(picture)]
    centres = np.array([((b[0] + b[2]) / 2, (b[1] + b[3]) / 2) for b in (item.bbox for item in found)])
    assert (centres.std(0) > 5).all(), "another place for every noise"


@pytest.mark.slow
def test_pretraining_writes_weights_that_make_reads(make_tiny, tmp_path, capsys):
    """A trial of a few steps: all stages run, and their result is what the checkpoint holds."""
    weights = tmp_path / "weights.safetensors"
    pretrain_kolors.pretrain(weights, scale=0.0005)
    assert make_tiny.make(tmp_path / "tiny", weights) and not make_tiny.make(tmp_path / "tiny", weights)
    from diffusers import KolorsPipeline

    pipe = KolorsPipeline.from_pretrained(tmp_path / "tiny/model")
    shipped = load_file(weights)
    assert pipe.vae.config.scaling_factor == pytest.approx(shipped["scaling_factor"].item())
    assert pipe.vae.config.scaling_factor != pytest.approx(0.18215)
    torch.testing.assert_close(pipe.unet.conv_in.weight.half(), shipped["unet.conv_in.weight"])
    output = capsys.readouterr().out
    assert all(f"{stage} 0/" in output for stage in ("vae", "decoder", "unet")), output
