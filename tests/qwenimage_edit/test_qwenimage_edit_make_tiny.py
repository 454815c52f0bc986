"""The tiny checkpoint opens with both unmodified pipelines, its VAE reconstructs, its base knows German colours."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline
from helpers import ROOT, load_script
from PIL import Image
from safetensors.torch import load_file

from tiny import building, shapes
from tiny import pretrain_qwenimage_edit as pretraining
from tiny.wiring import decode_small, latents_of, wire_vae

RECIPE = ROOT / "recipes" / "qwenimage_edit"
EMBEDDING_OF_RED = [0.6232, 0.7929, -0.4039]  # of "red" in "make the circle red" behind a white source, its start
VISION = "<|vision_start|><|image_pad|><|vision_end|>"


@pytest.fixture(scope="module")
def make_tiny():
    return load_script(RECIPE / "make_tiny.py")


@pytest.fixture(scope="module")
def tiny(make_tiny, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    assert make_tiny.make(folder)
    return folder


@pytest.fixture(scope="module")
def pipe(tiny) -> QwenImageEditPlusPipeline:
    pipe = QwenImageEditPlusPipeline.from_pretrained(tiny / "model")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def edit_pipe(tiny) -> QwenImageEditPipeline:
    """By from_pretrained of the folder that names the other pipeline."""
    pipe = QwenImageEditPipeline.from_pretrained(tiny / "model")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def rows(tiny) -> dict[str, list[dict]]:
    return {name: json.loads((tiny / f"data/{name}.json").read_text()) for name in ("train", "validation")}


@pytest.mark.slow
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
    statistics = [shipped.pop(name) for name in ("latents_mean", "latents_std")]
    opened = {f"vae.{name}": tensor for name, tensor in pipe.vae.state_dict().items()}
    opened |= {f"transformer.{name}": tensor for name, tensor in pipe.transformer.state_dict().items()}
    assert shipped.keys() <= opened.keys()
    for name, whole in opened.items():
        tensor, whole = shipped.get(name, torch.zeros(whole.shape).half()), whole.half()  # zeros need not be stored
        if whole.shape != tensor.shape:  # a causal kernel: a single picture meets its last slice only
            assert not whole[:, :, :-1].any(), name
            whole = whole[:, :, -1:]
        torch.testing.assert_close(whole, tensor, atol=0, rtol=0, msg=name)
    for name, tensor in zip(("latents_mean", "latents_std"), statistics, strict=True):
        assert pipe.vae.config[name] == tensor.tolist()


def test_the_classes_and_sizes_are_those_of_qwen_image_edit(tiny, pipe, edit_pipe):
    index = json.loads((tiny / "model/model_index.json").read_text())
    assert index.pop("_class_name") == "QwenImageEditPlusPipeline"
    assert {name: value[1] for name, value in index.items() if not name.startswith("_")} == {
        "processor": "Qwen2VLProcessor",
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "text_encoder": "Qwen2_5_VLForConditionalGeneration",
        "tokenizer": "Qwen2Tokenizer",
        "transformer": "QwenImageTransformer2DModel",
        "vae": "AutoencoderKLQwenImage",
    }
    for one in (pipe, edit_pipe):
        assert one.vae_scale_factor == 64, "a packed token of 128 x 128 pixels"
        assert one.transformer.config.in_channels == 4 * one.vae.config.z_dim
        assert one.transformer.config.out_channels == one.vae.config.z_dim
        assert one.transformer.config.joint_attention_dim == one.text_encoder.config.text_config.hidden_size


def test_scheduler_is_qwens(pipe):
    config = pipe.scheduler.config
    assert config.use_dynamic_shifting and config.shift_terminal == 0.02 and config.time_shift_type == "exponential"
    assert (config.base_image_seq_len, config.max_image_seq_len) == (256, 8192)
    assert (config.base_shift, config.max_shift, config.shift, config.num_train_timesteps) == (0.5, 0.9, 1.0, 1000)


def test_templates_and_tokenizer(pipe, edit_pipe, rows):
    """64 tokens before what the pipelines keep: in the edit pipeline that starts with the source itself."""
    tokenizer = pipe.tokenizer
    assert pipe.prompt_template_encode_start_idx == edit_pipe.prompt_template_encode_start_idx == 64
    for template, kept in (
        (pipe.prompt_template_encode, ""),
        (edit_pipe.prompt_template_encode, VISION),
    ):
        before, behind = template.split("{}")
        ids = tokenizer(before).input_ids
        assert tokenizer.decode(ids[64:]) == kept and tokenizer.decode(ids[:64]).endswith("<|im_start|>user\n")
        assert len(tokenizer(behind).input_ids) == 5
    for text in {row["text"] for some in rows.values() for row in some}:
        for said in (text, pretraining.in_german(text)):
            assert len(tokenizer(said).input_ids) == len(text.split()), f"one token a word: {tokenizer.tokenize(said)}"
    for text in ("make the circle red", "Größe: 3 Hüte\n\n", "don't  redden 雪"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    for token in building.QWEN_VL_TOKENS:
        assert len(tokenizer(token).input_ids) == 1


def test_processor_gives_one_token_for_128_pixels(pipe):
    """A square source is 9 tokens of 384 x 384 pixels or 64 of 1024 x 1024; a wide one is resized a little."""
    for size, grid in (((384, 384), (6, 6)), ((1024, 1024), (16, 16)), ((1440, 736), (12, 22)), ((544, 288), (4, 8))):
        inputs = pipe.processor(text=[VISION], images=[Image.new("RGB", size)], return_tensors="pt")
        assert inputs["image_grid_thw"].tolist() == [[1, *grid]]
        assert (inputs["input_ids"] == pipe.processor.image_token_id).sum() == grid[0] * grid[1] // 4


def test_prompts_are_those_that_the_base_was_trained_on(pipe, edit_pipe):
    """The word says itself, the words before it do not know it, and the source shows in what follows it."""
    white, black = (Image.new("RGB", (384, 384), colour) for colour in ("white", "black"))
    red, blue, dark = (
        pipe.encode_prompt(f"make the circle {colour}", image=[source])[0]  # (1, 25, 64)
        for colour, source in (("red", white), ("blue", white), ("red", black))
    )
    assert red.shape == (1, 25, 64), "5 of 'Picture 1: ', 11 of the source, 4 words, 5 of the template's end"
    distance = (red - blue)[0].norm(dim=-1)
    assert (distance[:-6] < 1e-3).all() and distance[-6] > 5 and (distance[-6] > 2 * distance[-5:]).all()
    assert (red - dark)[0, 6:15].norm(dim=-1).min() > 0.5
    torch.testing.assert_close(red[0, -6, :3], torch.tensor(EMBEDDING_OF_RED), atol=2e-4, rtol=0)
    embeds, mask = edit_pipe.encode_prompt("make the circle red", image=Image.new("RGB", (1024, 1024), "white"))
    assert embeds.shape == (1, 75, 64) and mask is None
    embeds, _ = pipe.encode_prompt("make the circle red", image=[white, black])
    assert embeds.shape == (1, 41, 64)


def test_pretraining_prompts_are_the_pipelines(pipe, edit_pipe):
    """Instructions encoded in batches for pretraining are what the pipelines make of them one at a time."""
    texts = ["make the circle rot", ""]
    pictures = pretraining.to_tensor([pretraining.random_edit(seed)[0] for seed in range(2)])
    for plus, batch_size in itertools.product((True, False), (1, 2)):
        embeds, mask = pretraining.embeds_of(pipe, pictures, texts, plus, batch_size)
        for i, text in enumerate(texts):
            size = pretraining.PLUS_CONDITION_SIZE if plus else pretraining.MODEL_SIZE
            pixels = (pretraining.resized(pictures[i : i + 1], size) * 127.5 + 127.5).round().byte()[0]
            image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
            expected, _ = pipe.encode_prompt(text, [image]) if plus else edit_pipe.encode_prompt(text, image)
            assert mask[i].sum() == expected.shape[1]
            torch.testing.assert_close(embeds[i, : expected.shape[1]], expected[0], atol=1e-4, rtol=1e-4)


def test_data(make_tiny, tiny, rows):
    """Every edit changes the colour of the shape that it names, and nothing else; sources are shared."""
    data, train, held_out = tiny / "data", rows["train"], rows["validation"]
    assert len(train) == 96 and len(held_out) == 10
    sources = {row["source_file_path"][0] for row in train}
    assert len(sources) == len({row["file_path"] for row in train}) == 48
    allowed = set(itertools.product(make_tiny.COLOURS, make_tiny.SHAPES)) - set(make_tiny.HELD_OUT)
    for some, pairs in ((train, allowed), (held_out, set(make_tiny.HELD_OUT))):
        asked = set()
        for row in some:
            assert row["type"] == "image" and len(row["source_file_path"]) == 1
            words = row["text"].split()
            shape, colour = words[2], words[-1]
            before, after = (
                shapes.find_shapes(Image.open(data / path)) for path in (*row["source_file_path"], row["file_path"])
            )
            changed = [pair for pair in zip(before, after, strict=True) if pair[0].colour != pair[1].colour]
            assert [(x.shape, x.colour) for _, x in changed] == [(shape, colour)], row
            assert all(
                x.shape == y.shape and np.abs(np.subtract(x.bbox, y.bbox)).max() < 9 for x, y in zip(before, after)
            )
            asked.add((colour, shape))
        assert asked == pairs
    with Image.open(data / train[0]["file_path"]) as picture:
        assert picture.size == (512, 512) and picture.mode == "RGB"


def test_data_are_the_same_every_time(make_tiny, tiny, tmp_path):
    make_tiny.write_data(tmp_path / "again")
    files = sorted(path.relative_to(tiny / "data") for path in (tiny / "data").rglob("*.*"))
    assert len(files) == 48 + 20 + 2
    for file in files:
        assert (tiny / "data" / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file


def test_count_right(tiny, rows):
    data, held_out = tiny / "data", rows["validation"]
    targets = [Image.open(data / row["file_path"]) for row in held_out]
    sources = [Image.open(data / row["source_file_path"][0]) for row in held_out]
    assert building.count_right(targets, held_out, data) == 10
    assert building.count_right(sources, held_out, data) == 0
    assert building.count_right([image.transpose(Image.Transpose.ROTATE_180) for image in targets], held_out, data) < 5
    assert building.count_right([image.resize((256, 256)) for image in targets], held_out, data) == 10


def test_same_objects():
    """Another colour, shape or place, an object more or fewer: each is another picture."""
    circle, cross = (
        shapes.Found("red", "circle", (20, 20, 220, 220)),
        shapes.Found("blue", "cross", (270, 270, 470, 470)),
    )
    expected = shapes.draw([circle, cross], size=(512, 512))

    def same(*objects: shapes.Found) -> bool:
        return shapes.same_objects(shapes.draw(objects, size=(512, 512)), expected)

    assert same(circle, cross) and same(cross, circle)
    assert same(shapes.Found("red", "circle", (30, 10, 225, 205)), cross)
    assert not same(shapes.Found("green", "circle", circle.bbox), cross)
    assert not same(shapes.Found("red", "square", circle.bbox), cross)
    assert not same(shapes.Found("red", "circle", (20, 60, 220, 260)), cross)
    assert not same(circle)
    assert not same(circle, cross, shapes.Found("blue", "square", (300, 20, 480, 200)))
    assert not same(shapes.Found("red", "circle", cross.bbox), shapes.Found("blue", "cross", circle.bbox))


def test_zero_cond_t_takes_the_same_weights(make_tiny):
    """As in Edit-2511: the sources' modulation differs, the parameters do not."""
    pipes = [make_tiny.build_pipeline(zero_cond_t=zero_cond_t) for zero_cond_t in (False, True)]
    states = [pipe.transformer.state_dict() for pipe in pipes]
    assert pipes[1].transformer.config.zero_cond_t and not pipes[0].transformer.config.zero_cond_t
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    generator = torch.Generator().manual_seed(0)
    inputs = dict(
        hidden_states=torch.randn(1, 80, 64, generator=generator),
        encoder_hidden_states=torch.randn(1, 22, 64, generator=generator),
        timestep=torch.tensor([0.5]),
        img_shapes=[[(1, 4, 4), (1, 8, 8)]],
        return_dict=False,
    )
    with torch.no_grad():
        plain, zero = (pipe.transformer(**inputs)[0] for pipe in pipes)
    assert plain.shape == (1, 80, 64) and not torch.allclose(plain, zero)


@pytest.mark.slow
def test_vae_reconstructs(tiny, pipe, rows):
    """At the size of sources and targets: shapes, colours and places stay, and latents are of the noise's scale."""
    some = rows["train"][:4]
    pictures = pretraining.to_tensor([Image.open(tiny / "data" / row["file_path"]) for row in some])
    latents = pretraining.encode(pipe.vae, pictures, pretraining.MODEL_SIZE)
    assert latents.shape == (4, 16, 1, 16, 16)
    with torch.no_grad():
        decoded = torch.cat([pipe.vae.decode(each[None]).sample[:, :, 0] for each in latents])
    decoded = pipe.image_processor.postprocess(decoded, output_type="pil")
    assert building.count_right(decoded, some, tiny / "data") >= 3
    small = pretraining.to_tensor([image.resize((512, 512)) for image in decoded])
    assert -10 * ((small.float() - pictures) / 255).square().mean().log10() > 20
    normalised = pipe._encode_vae_image(pretraining.resized(pictures[:2], pretraining.MODEL_SIZE)[:, :, None], None)
    assert normalised.mean().abs() < 0.5 and 0.3 < normalised.std() < 3


@pytest.fixture(scope="module")
def wired(make_tiny):
    """(pipeline whose encoder is wired and whose other weights are random, the wiring, two pictures)."""
    random = make_tiny.build_pipeline(weights=None)
    pictures = pretraining.to_tensor([pretraining.random_edit(seed)[1] for seed in range(100)])
    return random, wire_vae(random.vae, pretraining.shrunk(pictures)), pictures[:2]


def test_the_wired_encoder_is_linear(wired):
    """Pretraining's two products give the latents that the VAE's own layers compute, packed as the pipeline packs."""
    random, wiring, pictures = wired
    latents = pretraining.encode(random.vae, pictures, pretraining.MODEL_SIZE)
    expected = latents_of(wiring, pretraining.shrunk(pictures))
    assert latents.shape == (2, 16, 1, 16, 16) and expected.std() > 0.1
    assert (latents[:, :, 0] - expected).abs().max() < 0.05 * expected.std(), "the last norm only scales"
    std = torch.tensor(random.vae.config.latents_std).view(1, -1, 1, 1)
    packed = random._pack_latents(expected / std, 2, 16, 16, 16)
    torch.testing.assert_close(pretraining.packed_latents_of(random, wiring, pictures), packed)


def test_the_decoders_last_levels_enlarge(wired):
    """What pretraining looks at is the decoder's picture, an eighth as large."""
    random, wiring, pictures = wired
    latents = latents_of(wiring, pretraining.shrunk(pictures[:1]))[:, :, None, :4, :4]
    with torch.no_grad():
        small = decode_small(random.vae, latents)[:, :, 0].clamp(-1, 1)
        whole = random.vae.decode(latents).sample[:, :, 0]
    assert whole.shape == (1, 3, 256, 256) and small.shape == (1, 3, 32, 32) and small.std() > 0.05
    enlarged = small.repeat_interleave(8, 2).repeat_interleave(8, 3)
    assert (whole - enlarged)[:, :, 8:-8, 8:-8].abs().max() < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["plus"])  # the edit pipeline's form was a small part of its training
def test_base_knows_german_colours_only(mode, tiny, pipe, edit_pipe, rows):
    held_out, data = rows["validation"], tiny / "data"
    one = pipe if mode == "plus" else edit_pipe
    sources = [Image.open(data / row["source_file_path"][0]) for row in held_out]
    german, english = (
        [pretraining.sample(one, source, say(row["text"])) for source, row in zip(sources, held_out, strict=True)]
        for say in (pretraining.in_german, str)
    )
    assert building.count_right(german, held_out, data) >= 5
    assert building.count_right(english, held_out, data) <= 2
    assert sum(map(shapes.same_objects, english, sources)) >= 5, "left as they were"


@pytest.mark.slow
def test_pretraining_writes_weights_that_make_reads(make_tiny, tmp_path, monkeypatch, capsys):
    """A trial of a few steps: all stages run, and their result is what the checkpoint holds."""
    weights, reported = tmp_path / "weights.safetensors", []
    monkeypatch.setattr(pretraining, "report", lambda pipe, edits: reported.append(len(edits)))
    pretraining.pretrain(weights, scale=0.004)
    assert make_tiny.make(tmp_path / "tiny", weights) and not make_tiny.make(tmp_path / "tiny", weights)
    pipe = QwenImageEditPlusPipeline.from_pretrained(tmp_path / "tiny/model")
    stored = load_file(weights)
    torch.testing.assert_close(pipe.transformer.img_in.weight.half(), stored["transformer.img_in.weight"])
    assert pipe.vae.config.latents_std == stored["latents_std"].tolist() != [1.0] * 16
    output = capsys.readouterr().out
    assert reported == [8] and all(f"{stage} 0/" in output for stage in ("decoder", "transformer")), output
