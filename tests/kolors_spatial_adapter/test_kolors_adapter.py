"""The adapter: nothing at step 0, where it acts, what guidance and tau do, saving, IP-Adapter, compilation."""

import copy
import json

import numpy as np
import pytest
import torch
from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.embeddings import get_fourier_embeds_from_boundingbox
from PIL import Image

OBJECTS = [
    {"phrase": "red circle", "bbox": [0.05, 0.1, 0.45, 0.5]},
    {"phrase": "blue square", "bbox": [0.5, 0.55, 0.95, 0.9]},
]
PROMPT = "a red circle and a blue square, on a white background"
INJECTIONS = ["cross_attention", "gated_self_attention"]


def open_gates(adapter, value: float = 0.07) -> None:
    for layer in adapter.layers.values():
        layer.gate.data.fill_(value)


def small_adapter(adapter_module, pipeline, **settings):
    torch.manual_seed(0)
    settings = {"rank": 32, "token_width": 64, "max_objects": 4, **settings}
    return adapter_module.new_adapter(pipeline.unet, **settings)


def picture(adapter_module, pipeline, adapter, objects=OBJECTS, **settings) -> np.ndarray:
    settings = {"height": 64, "width": 96, "num_inference_steps": 3, "guidance_scale": 3.0, **settings}
    generator = torch.Generator().manual_seed(5)
    image = adapter_module.draw(pipeline, adapter, PROMPT, objects, generator=generator, **settings)
    assert isinstance(image, Image.Image)
    return np.asarray(image).astype(int)


def plain_picture(pipeline, guidance_scale=3.0) -> np.ndarray:
    """By the unmodified pipeline alone."""
    image = pipeline(
        PROMPT,
        height=64,
        width=96,
        num_inference_steps=3,
        guidance_scale=guidance_scale,
        generator=torch.Generator().manual_seed(5),
    ).images[0]
    return np.asarray(image).astype(int)


def unet_call(pipeline, seed: int = 0, batch_size: int = 2, size: tuple[int, int] = (16, 24)) -> dict:
    rng = torch.Generator().manual_seed(seed)
    width = pipeline.unet.config.encoder_hid_dim
    return {
        "sample": torch.randn(batch_size, 4, *size, generator=rng),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(batch_size, 7, width, generator=rng),
        "added_cond_kwargs": {
            "text_embeds": torch.randn(batch_size, width, generator=rng),
            "time_ids": torch.tensor([[64.0, 96, 0, 0, 64, 96]] * batch_size),
        },
    }


def set_layout(adapter_module, adapter, pipeline, size=(16, 24), guided=True) -> None:
    phrases = [item["phrase"] for item in OBJECTS]
    embeds = adapter_module.embed_phrases(pipeline.tokenizer, pipeline.text_encoder, phrases)
    adapter.layout = adapter_module.layout_for_pipeline(
        adapter, pipeline.unet, embeds, [item["bbox"] for item in OBJECTS], size, guided
    )


# ---- step 0, and what acts


@pytest.mark.parametrize("injection", INJECTIONS)
def test_an_untrained_adapter_changes_nothing(adapter_module, pipeline, injection):
    """Catches a gate that does not begin at zero, and processors that change attn2: equal to the bit."""
    plain = plain_picture(pipeline)
    call = unet_call(pipeline)
    with torch.no_grad():
        expected = pipeline.unet(**call).sample
        adapter = small_adapter(adapter_module, pipeline, injection=injection)
        set_layout(adapter_module, adapter, pipeline)
        assert torch.equal(pipeline.unet(**call).sample, expected)
    adapter.layout = None
    assert np.array_equal(picture(adapter_module, pipeline, adapter), plain)
    assert set(adapter_module.gate_values(adapter).values()) == {0.0}


@pytest.mark.parametrize("injection", INJECTIONS)
def test_every_layer_acts(adapter_module, pipeline, injection):
    """Catches an attn2 that was left out, and layers that are computed and thrown away."""
    adapter, call = small_adapter(adapter_module, pipeline, injection=injection), unet_call(pipeline)
    set_layout(adapter_module, adapter, pipeline)
    names = [
        name
        for name, block in pipeline.unet.named_modules()
        if isinstance(block, BasicTransformerBlock) and block.attn2 is not None
    ]
    assert sorted(adapter.cfg.widths) == sorted(f"{name}.attn2" for name in names) and names
    with torch.no_grad():
        plain = pipeline.unet(**call).sample
        for layer in adapter.layers.values():
            layer.gate.data.fill_(1.0)
            assert not torch.equal(pipeline.unet(**call).sample, plain)
            layer.gate.data.zero_()
    open_gates(adapter)
    assert list(adapter_module.gate_values(adapter).values()) == [pytest.approx(np.tanh(0.7))] * len(names)


def test_an_opened_adapter_draws_otherwise_and_leaves_nothing_behind(adapter_module, pipeline):
    """Catches boxes that never reach the UNet, and an adapter that stays on in the next picture."""
    plain = plain_picture(pipeline)
    adapter = small_adapter(adapter_module, pipeline)
    open_gates(adapter)
    assert not np.array_equal(picture(adapter_module, pipeline, adapter), plain)
    assert np.array_equal(picture(adapter_module, pipeline, adapter, objects=[]), plain)
    assert np.array_equal(picture(adapter_module, pipeline, None), plain)
    assert np.array_equal(plain_picture(pipeline), plain)
    moved = [{**OBJECTS[0], "bbox": [0.5, 0.5, 0.9, 0.9]}, OBJECTS[1]]
    renamed = [{**OBJECTS[0], "phrase": "yellow star"}, OBJECTS[1]]
    ours = picture(adapter_module, pipeline, adapter)
    assert not np.array_equal(picture(adapter_module, pipeline, adapter, objects=moved), ours)
    assert not np.array_equal(picture(adapter_module, pipeline, adapter, objects=renamed), ours)
    assert np.abs(picture(adapter_module, pipeline, adapter, objects=OBJECTS[::-1]) - ours).max() <= 1  # any order


def test_a_failed_picture_leaves_no_layout(adapter_module, pipeline):
    """Catches an adapter that stays on after an error in the middle of sampling."""
    adapter = small_adapter(adapter_module, pipeline)
    with pytest.raises(ValueError):
        picture(adapter_module, pipeline, adapter, height=61)
    assert adapter.layout is None
    with pytest.raises(ValueError, match="swapped"):
        picture(adapter_module, pipeline, adapter, objects=[{"phrase": "x", "bbox": [0.9, 0, 0.1, 1]}])


def test_the_unconditional_half_gets_null_boxes(adapter_module, pipeline):
    """Catches guidance that takes the boxes away again, because both halves have them, or that has them the wrong way
    round."""
    adapter, call = small_adapter(adapter_module, pipeline), unet_call(pipeline)
    open_gates(adapter)
    with torch.no_grad():
        set_layout(adapter_module, adapter, pipeline, guided=True)
        both = pipeline.unet(**call).sample
        guided = adapter.layout.tokens
        set_layout(adapter_module, adapter, pipeline, guided=False)
        adapter.layout.tokens = adapter.layout.tokens.expand(2, -1, -1)
        adapter.layout.inside = {size: inside.expand(2, -1, -1) for size, inside in adapter.layout.inside.items()}
        assert torch.allclose(pipeline.unet(**call).sample[1], both[1], atol=1e-5)
        nothing = torch.zeros(2, 4, dtype=torch.bool)
        zeros = torch.zeros(2, 4, pipeline.unet.config.encoder_hid_dim), torch.zeros(2, 4, 4)
        adapter.layout = adapter_module.make_layout(adapter, pipeline.unet, *zeros, nothing, nothing, (16, 24))
        assert torch.allclose(adapter.layout.tokens[0], guided[0]) and torch.equal(guided[0, 0], guided[0, 1])
        assert torch.allclose(pipeline.unet(**call).sample[0], both[0], atol=1e-5)
    assert not torch.allclose(guided[1, 0], guided[1, 1]) and torch.allclose(guided[1, 2], guided[0, 0])


def test_one_half_without_guidance(adapter_module, pipeline):
    """Catches a layout of two rows for a batch of one, which broadcasting would hide."""
    adapter = small_adapter(adapter_module, pipeline)
    open_gates(adapter)
    seen = tokens_of_each_call(pipeline, adapter)
    picture(adapter_module, pipeline, adapter, guidance_scale=1.0)
    assert [len(tokens) for tokens in seen] == [1, 1, 1]


def tokens_of_each_call(pipeline, adapter) -> list:
    seen = []
    pipeline.unet.register_forward_pre_hook(
        lambda module, inputs: seen.append(adapter.layout and adapter.layout.tokens)
    )
    return seen


@pytest.mark.parametrize(("tau", "steps"), [(1.0, 5), (0.6, 3), (0.5, 3), (0.2, 1), (0.0, 0)])
def test_tau(adapter_module, pipeline, tau, steps):
    """Catches an adapter that acts in the last steps instead of the first, or one step too many."""
    adapter = small_adapter(adapter_module, pipeline)
    open_gates(adapter)
    seen = tokens_of_each_call(pipeline, adapter)
    ours = picture(adapter_module, pipeline, adapter, tau=tau, num_inference_steps=5)
    assert [tokens is not None for tokens in seen] == [True] * steps + [False] * (5 - steps)
    if tau == 0.0:
        assert np.array_equal(ours, picture(adapter_module, pipeline, None, num_inference_steps=5))


def test_more_boxes_than_slots(adapter_module, pipeline):
    """Catches a picture with many boxes that fails, or that keeps the small ones."""
    adapter = small_adapter(adapter_module, pipeline, max_objects=2)
    open_gates(adapter)
    small = {"phrase": "green cross", "bbox": [0.9, 0.9, 0.99, 0.99]}
    ours = picture(adapter_module, pipeline, adapter)
    assert np.array_equal(picture(adapter_module, pipeline, adapter, objects=[small, *OBJECTS]), ours)


# ---- its parts


def test_fourier_features_are_those_of_gligen(adapter_module):
    """Catches other frequencies than GLIGEN's (diffusers has them for its own GLIGEN), in any order."""
    box = torch.tensor([[[0.1, 0.25, 0.6, 0.9]]])
    ours = adapter_module.fourier_features(box).flatten()
    theirs = get_fourier_embeds_from_boundingbox(adapter_module.FREQUENCIES, box).flatten()
    assert ours.shape == theirs.shape == (64,)
    assert torch.allclose(ours.sort().values, theirs.sort().values, atol=1e-5)


def test_positions_of_pixels(adapter_module):
    """Catches x and y swapped, rows for columns, and a resolution of the UNet that is missing."""
    assert adapter_module.resolutions(16, 24, 2) == [(16, 24), (8, 12), (4, 6)]
    assert adapter_module.resolutions(5, 7, 2) == [(5, 7), (3, 4), (2, 2)]
    for height, width in ((16, 24), (8, 12), (4, 6)):
        features = adapter_module.pixel_positions(height, width, torch.device("cpu"))
        assert features.shape == (height * width, 4 * adapter_module.FREQUENCIES)
        for row, column in ((0, 0), (1, 3), (height - 1, width - 2)):
            centre = torch.tensor([(column + 0.5) / width, (row + 0.5) / height])
            assert torch.allclose(features[row * width + column], adapter_module.fourier_features(centre))


@pytest.mark.parametrize("injection", INJECTIONS)
def test_pixels_inside_a_box_attend_to_its_token(adapter_module, pipeline, injection, monkeypatch):
    """Catches a bias that goes to another token, to the picture's own keys, outside the box, or by another factor than
    box_bias x coverage: against attention with the bias as a mask."""
    adapter = small_adapter(adapter_module, pipeline, injection=injection)
    layer = next(iter(adapter.layers.values()))
    layer.gate.data.fill_(1.0)
    layer.box_bias.data.copy_(torch.linspace(-2, 3, len(layer.box_bias)))
    width = next(iter(adapter.cfg.widths.values()))
    hidden, tokens, positions = torch.randn(2, 24, width), torch.randn(2, 4, 64), torch.randn(24, 32)
    inside = torch.rand(2, 24, 4)
    ours = layer(hidden, tokens, positions, inside)
    attention, seen = torch.nn.functional.scaled_dot_product_attention, []

    def with_mask(query, key, value, scale):
        n = key.shape[2] - 4
        mask = torch.nn.functional.pad(inside[:, None] * layer.box_bias[:, None, None], (n, 0))
        seen.append(n)
        return attention(query, key, value, attn_mask=mask, scale=scale)

    monkeypatch.setattr(adapter_module.F, "scaled_dot_product_attention", with_mask)
    monkeypatch.setattr(layer, "with_bias", lambda query, key, inside, scale: (query, key))
    assert torch.allclose(layer(hidden, tokens, positions, inside), ours, atol=1e-5)
    assert seen == [24 if injection == "gated_self_attention" else 0]


def test_layouts_say_which_pixels_a_box_covers(adapter_module, pipeline):
    """Catches coverage in another order than the pixels', of null boxes, or of the unconditional half."""
    adapter = small_adapter(adapter_module, pipeline)
    set_layout(adapter_module, adapter, pipeline)
    inside = adapter.layout.inside[8 * 12]
    assert inside.shape == (2, 96, 4) and not inside[0].any() and not inside[1, :, 2:].any()
    grid = inside[1, :, 0].view(8, 12)  # the box [0.05, 0.1, 0.45, 0.5]
    assert grid[2:4, 2:5].min() > 0.999 and not grid[4:].any() and not grid[:, 6:].any()
    assert grid.mean().item() == pytest.approx(0.4 * 0.4, abs=1e-5)


def test_phrases_are_means_of_the_prompts_hidden_states(adapter_module, pipeline):
    """Catches another layer than the UNet's, padding or leading tokens in the mean, and positions that start
    elsewhere."""
    prompt_embeds, *_ = pipeline.encode_prompt("red circle", "cpu", do_classifier_free_guidance=False)
    own = len(pipeline.tokenizer("red circle")["input_ids"]) - 2
    phrases = ["red circle", "a blue star at the top"]  # of other lengths, so that the first is padded
    ours, _ = adapter_module.embed_phrases(pipeline.tokenizer, pipeline.text_encoder, phrases)
    assert torch.allclose(ours, prompt_embeds[0, -own:].mean(0), atol=1e-5)
    assert not torch.allclose(ours, prompt_embeds[0, -own - 1 :].mean(0), atol=1e-3)


def test_every_parameter_learns(adapter_module, pipeline):
    """Catches a parameter that nothing depends on, and a frozen weight that gets a gradient."""
    for injection in INJECTIONS:
        adapter = small_adapter(adapter_module, pipeline, injection=injection)
        open_gates(adapter)
        pipeline.unet.requires_grad_(False)
        phrases, boxes = torch.randn(2, 4, pipeline.unet.config.encoder_hid_dim), torch.rand(2, 4, 4)
        present = torch.tensor([[True, True, False, False], [True, False, False, False]])
        adapter.layout = adapter_module.make_layout(adapter, pipeline.unet, phrases, boxes, present, present, (16, 24))
        pipeline.unet(**unet_call(pipeline)).sample.square().sum().backward()
        dead = [name for name, p in adapter.named_parameters() if p.grad is None or not p.grad.any()]
        assert not dead, dead
        assert all(p.grad is None for p in pipeline.unet.parameters())


def test_gradient_checkpointing_gives_the_same_gradients(adapter_module, pipeline):
    """Catches a recomputation that sees another layout, or that cuts the adapter off the graph."""
    adapter = small_adapter(adapter_module, pipeline)
    open_gates(adapter)
    pipeline.unet.requires_grad_(False)
    phrases, boxes = torch.randn(2, 4, pipeline.unet.config.encoder_hid_dim), torch.rand(2, 4, 4)
    present = torch.ones(2, 4, dtype=torch.bool)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            pipeline.unet.enable_gradient_checkpointing()
        adapter.zero_grad()
        adapter.layout = adapter_module.make_layout(adapter, pipeline.unet, phrases, boxes, present, present, (16, 24))
        pipeline.unet(**unet_call(pipeline)).sample.square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in adapter.named_parameters()})
    for name, expected in gradients[0].items():
        assert torch.allclose(gradients[1][name], expected, rtol=1e-4, atol=1e-6), name


# ---- other UNets


@pytest.fixture(scope="module")
def full_size_config(recipe) -> dict:
    return json.loads((recipe / "full_size/unet.json").read_text())


@pytest.fixture(scope="module")
def full_size(full_size_config) -> UNet2DConditionModel:
    with init_empty_weights():
        return UNet2DConditionModel.from_config(full_size_config)


def test_full_size(adapter_module, train, full_size):
    """Catches layers of the real UNet that are missed, and a default that is not about 50 million parameters."""
    with init_empty_weights():
        adapter = adapter_module.new_adapter(full_size, rank=train.Config.adapter_rank)
    widths = list(adapter.cfg.widths.values())
    assert (len(widths), widths.count(640), widths.count(1280)) == (70, 10, 60)
    count = sum(p.numel() for p in adapter.parameters())
    assert 45e6 < count < 55e6, count
    assert abs(sum(p.numel() for p in full_size.parameters()) - 2.579e9) < 2e6


def test_other_widths_and_none(adapter_module, full_size_config, pipeline):
    """Catches widths that are taken for granted, an adapter on a UNet without cross-attention that trains nothing, and
    one that is put on another UNet than its own."""
    config = dict(full_size_config, transformer_layers_per_block=1, addition_embed_type=None, encoder_hid_dim=None)
    config |= {"encoder_hid_dim_type": None, "cross_attention_dim": 768}
    for name in ("down_block_types", "up_block_types"):
        first, *others = config[name]
        config[name] = [first.replace("DownBlock2D", "CrossAttnDownBlock2D"), *others]
    with init_empty_weights():
        other = UNet2DConditionModel.from_config(config)
        adapter = adapter_module.new_adapter(other)
        assert set(adapter.cfg.widths.values()) == {320, 640, 1280} and adapter.cfg.phrase_width == 768
        with pytest.raises(ValueError, match="is for a UNet with"):
            adapter_module.install(adapter, pipeline.unet)
        plain = dict(config, down_block_types=("DownBlock2D",) * 3, up_block_types=("UpBlock2D",) * 3)
        without = UNet2DConditionModel.from_config(dict(plain, mid_block_type=None))
        with pytest.raises(ValueError, match="no cross-attention"):
            adapter_module.new_adapter(without)


def test_rank_is_a_multiple_of_the_heads_width(adapter_module, pipeline):
    """Catches a rank that heads do not divide, found as a shape error in the first step."""
    with pytest.raises(ValueError, match="multiple of 32"):
        small_adapter(adapter_module, pipeline, rank=40)


# ---- saving


@pytest.mark.parametrize("injection", INJECTIONS)
def test_a_saved_adapter_draws_the_same_picture(adapter_module, pipeline, injection, tmp_path):
    """Catches settings or weights that are not saved: the same picture to the bit."""
    adapter = small_adapter(adapter_module, pipeline, injection=injection, vocabulary=[3, 5], query_positions=True)
    open_gates(adapter)
    ours = picture(adapter_module, pipeline, adapter)
    adapter_module.save_adapter(adapter, tmp_path)
    loaded = adapter_module.load_adapter(tmp_path, pipeline.unet)
    assert loaded.cfg == adapter.cfg and not any(p.requires_grad for p in loaded.parameters())
    assert np.array_equal(picture(adapter_module, pipeline, loaded), ours)
    assert {file.name for file in tmp_path.iterdir()} == {"adapter_model.safetensors", "config.json"}


def test_no_adapter_to_load(adapter_module, pipeline, tmp_path):
    """Catches an adapter that is silently left out when its folder is wrong."""
    with pytest.raises(ValueError, match="no adapter in"):
        adapter_module.load_adapter(tmp_path, pipeline.unet)


def test_a_second_adapter_replaces_the_first(adapter_module, pipeline):
    """Catches two adapters that add up, one of them forgotten."""
    plain = plain_picture(pipeline)
    first = small_adapter(adapter_module, pipeline)
    open_gates(first)
    set_layout(adapter_module, first, pipeline)
    second = small_adapter(adapter_module, pipeline)
    assert np.array_equal(picture(adapter_module, pipeline, second), plain)


# ---- IP-Adapter


def ip_adapter_weights(unet: UNet2DConditionModel, image_width: int = 12, tokens: int = 4) -> dict:
    """What an IP-Adapter's file holds, at this UNet's widths and random."""
    torch.manual_seed(1)
    cross = unet.config.cross_attention_dim
    ids = range(1, 2 * len(unet.attn_processors), 2)
    layers, names = {}, [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    for number, name in zip(ids, names, strict=False):
        width = unet.get_submodule(name.removesuffix(".processor")).to_q.in_features
        layers |= {f"{number}.to_{kind}_ip.weight": torch.randn(width, cross) for kind in "kv"}
    image_proj = {
        "proj.weight": torch.randn(tokens * cross, image_width),
        "proj.bias": torch.zeros(tokens * cross),
        "norm.weight": torch.ones(cross),
        "norm.bias": torch.zeros(cross),
    }
    return {"image_proj": image_proj, "ip_adapter": layers}


def test_with_an_ip_adapter(adapter_module, pipeline):
    """Catches a text projection that is looked for where an IP-Adapter has taken it from, and an IP-Adapter that the
    adapter's processors switch off."""
    projection = pipeline.unet.encoder_hid_proj
    pipeline.unet._load_ip_adapter_weights([ip_adapter_weights(pipeline.unet)], low_cpu_mem_usage=False)
    assert pipeline.unet.encoder_hid_proj is not projection
    assert adapter_module.text_projection(pipeline.unet) is projection
    call = unet_call(pipeline)
    call["added_cond_kwargs"]["image_embeds"] = [torch.randn(2, 1, 12)]
    with torch.no_grad():
        expected = pipeline.unet(**call).sample
        adapter = small_adapter(adapter_module, pipeline)
        set_layout(adapter_module, adapter, pipeline)
        assert torch.equal(pipeline.unet(**call).sample, expected)
        open_gates(adapter)
        with_both = pipeline.unet(**call).sample
        assert not torch.allclose(with_both, expected)
        call["added_cond_kwargs"]["image_embeds"] = [torch.randn(2, 1, 12)]
        assert not torch.allclose(pipeline.unet(**call).sample, with_both)


# ---- torch.compile


def test_blocks_compile_without_graph_breaks(adapter_module, pipeline):
    """Catches processors that break torch.compile's graph, and a recompilation for every layer."""
    adapter = small_adapter(adapter_module, pipeline)
    open_gates(adapter)
    pipeline.unet.requires_grad_(False)
    call = unet_call(pipeline)
    plain_unet = copy.deepcopy(pipeline.unet)  # with processors of its own copy of the adapter
    plain_adapter = next(
        processor.adapter for name, processor in plain_unet.attn_processors.items() if hasattr(processor, "adapter")
    )
    set_layout(adapter_module, adapter, pipeline)
    plain_adapter.layout = adapter.layout
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    blocks = [module for module in pipeline.unet.modules() if isinstance(module, BasicTransformerBlock)]
    for block in blocks:
        block.compile(backend=counter, fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(pipeline.unet(**call).sample, plain_unet(**call).sample, atol=1e-5)
    widths = {block.attn2.to_q.in_features for block in blocks}
    assert counter.frame_count <= 2 * len(widths), (counter.frame_count, len(blocks))
    before = counter.frame_count
    with torch.no_grad():
        set_layout(adapter_module, adapter, pipeline)  # other tensors, the same graph
        pipeline.unet(**call)
    assert counter.frame_count == before
    torch._dynamo.reset()
