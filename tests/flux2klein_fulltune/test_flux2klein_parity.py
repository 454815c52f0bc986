"""The transformer is called in training as the unmodified Flux2KleinPipeline calls it: same names, shapes, dtypes,
values; with and without reference images."""

import functools
import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from parity import Spy, assert_batch_is_rows, assert_same_call, call_of_loss, first, mixed, picture
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from common.data.images import image_to_tensor
from common.data.manifest import Record
from common.data.order import MicroBatchSampler
from common.start.folders import part_config
from common.step.flow_matching import (
    draw_normal,
    draw_sigmas,
    draw_uniform,
    sample_rngs,
    sample_sigmas,
    shift_sigmas,
    velocity_target,
)

WIDTH, HEIGHT = 96, 64  # not square: a swap of the two fails
TOKENS = (WIDTH // 16) * (HEIGHT // 16)
PROMPTS = ["a red circle on the left, on a white background", "a cross"]  # of different lengths
LENGTH = 40  # max_sequence_length: longer than both prompts, so that padding is seen
SIZE = (WIDTH, HEIGHT)
LARGE, TALL, FLAT = (1100, 1000), (70, 130), (150, 64)  # (width, height) of references; the first is shrunk


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def world(request, train, settings, model_folder) -> SimpleNamespace:
    """The recipe's encoders and models, and the unmodified pipeline with a spy on the transformer that both use."""
    dtype = getattr(torch, request.param)
    cfg = settings(seed=5, caption_dropout=0.0, max_sequence_length=LENGTH)
    encoders = train.Encoders(cfg, model_folder, torch.device("cpu"), dtype)
    # a schedule without shift, so that the pipeline can be told which sigma to use
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(
        model_folder / "scheduler", use_dynamic_shifting=False, shift=1.0
    )
    # and a VAE in float32, as the recipe encodes
    pipeline = Flux2KleinPipeline.from_pretrained(model_folder, scheduler=scheduler, vae=encoders.vae, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    spy = Spy(pipeline.transformer)
    models = train.Models(
        transformer=pipeline.transformer,
        config=dict(pipeline.transformer.config),
        scheduler_config=FlowMatchEulerDiscreteScheduler.load_config(model_folder / "scheduler"),
        empty_prompt_embeds=encoders.prompts([""])[0],
        dtype=dtype,
    )
    everything = dict(train=train, encoders=encoders, pipeline=pipeline, spy=spy, models=models, cfg=cfg, dtype=dtype)
    return SimpleNamespace(**everything, encoded={})


def reference(world: SimpleNamespace, image: Image.Image) -> Tensor:
    """(128, h, w): the latents of a reference image."""
    pixels = world.train.reference_images.pixels(image, world.pipeline.image_processor)
    return world.encoders.images(pixels[None], moments=False)["latents"][0]


def encoded(world: SimpleNamespace, number: int, references: tuple[Image.Image, ...] = ()) -> dict:
    """A row as the cache holds it."""
    if number not in world.encoded:
        pixels = image_to_tensor(picture(number, SIZE))
        item = PROMPTS[number % len(PROMPTS)], None
        world.encoded[number] = first(world.encoders.encode([item], {"pixels": pixels[None]}))
    latents = {f"reference_{index}": reference(world, image) for index, image in enumerate(references)}
    return {**world.encoded[number], **latents}


def batch(world: SimpleNamespace, numbers: list[int], references: tuple[tuple[Image.Image, ...], ...] = ()) -> dict:
    """A micro-batch of step 3 as the loader makes it; the pictures' positions in the step are their numbers."""
    rows = itertools.zip_longest(numbers, references, fillvalue=())
    place = {"step": 3, "group_size": 2}
    return world.train.loader.collate([{**encoded(world, n, r), **place, "position": n} for n, r in rows])


def drawn_noise(world: SimpleNamespace, numbers: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(uniform numbers (B,), noise (B, C, H/16, W/16)) of step 3, from the generators that compute_loss is to use."""
    rngs = sample_rngs(world.cfg.run.seed, 3, numbers)
    uniform, _ = draw_uniform(rngs), draw_uniform(rngs)
    return uniform, draw_normal(rngs, (world.pipeline.transformer.config.in_channels, HEIGHT // 16, WIDTH // 16))


def noisy_by_diffusers(world: SimpleNamespace, numbers: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(noisy latents (B, C, H/16, W/16), sigma (B,)) from the same random numbers, encoded and mixed by diffusers' own
    means."""
    pipeline = world.pipeline
    pixels = pipeline.image_processor.preprocess([picture(number, SIZE) for number in numbers]).float()  # (B, 3, H, W)
    with torch.no_grad():
        latents = pipeline._encode_vae_image(pixels, generator=None)
    uniform, noise = drawn_noise(world, numbers)
    mu = 0.5 + (1.15 - 0.5) * (TOKENS - 256) / (4096 - 256)
    sigma = shift_sigmas(sample_sigmas(uniform, "logit_normal"), math.exp(mu)).to(torch.float64)
    noisy = [
        mixed(pipeline.scheduler, latent[None], s.item(), n[None])
        for latent, s, n in zip(latents, sigma, noise, strict=True)
    ]
    return torch.cat(noisy), sigma


def call_of_pipeline(
    world: SimpleNamespace, prompts: list[str], noisy: torch.Tensor, sigma: float, references: tuple = ()
) -> dict:
    world.spy.calls.clear()
    world.pipeline(
        image=list(references) or None, prompt=prompts, latents=noisy.to(world.dtype), sigmas=[sigma], height=HEIGHT,
        width=WIDTH, guidance_scale=1.0, max_sequence_length=LENGTH, output_type="latent",
    )  # fmt: skip
    (call,) = world.spy.calls
    return call


def only_float32(world: SimpleNamespace) -> None:
    if world.dtype != torch.float32:
        pytest.skip("compared in float32")


# ---- text to image


@pytest.mark.parametrize("number", [0, 1])
def test_one_sample(world, number):
    """Catches a wrong prompt template, layers, padding, normalisation, mixing, packing, timestep scale, ids or
    dtype."""
    noisy, sigma = noisy_by_diffusers(world, [number])
    ours = call_of_loss(world, batch(world, [number]))
    pipelines = call_of_pipeline(world, [PROMPTS[number]], noisy, sigma.item())
    assert_same_call(ours, pipelines, {"hidden_states": 1e-4 if world.dtype == torch.float32 else 1e-2})
    assert ours["guidance"] is None and 0 < ours["timestep"].item() <= 1
    assert ours["img_ids"][0].amax(0).tolist() == [0, HEIGHT // 16 - 1, WIDTH // 16 - 1, 0]


def test_two_unequal_prompts(world):
    """Catches another padding than the pipeline's, and a mask where it passes none."""
    ours = call_of_loss(world, batch(world, [0, 1]))
    noisy, _ = noisy_by_diffusers(world, [0, 1])
    pipelines = call_of_pipeline(world, PROMPTS, noisy, 0.5)
    for name in ("timestep", "hidden_states"):  # the pipeline has one sigma for the batch; compared one by one above
        assert ours[name].shape == pipelines[name].shape and ours[name].dtype == pipelines[name].dtype
        ours[name] = pipelines[name]
    # the text encoder's batch of two differs from two batches of one in the last bits
    assert_same_call(ours, pipelines, {"encoder_hidden_states": 1e-5 if world.dtype == torch.float32 else 5e-2})
    assert ours["encoder_hidden_states"].shape[1] == LENGTH and not any("mask" in name for name in ours)
    assert (ours["encoder_hidden_states"].abs().amax(-1) > 0).all(), "padding is encoded, not zeros"


def test_loss_of_two_is_the_mean_of_each(world):
    """Catches samples that see each other: the loss of a batch is the mean of its samples' losses."""
    only_float32(world)
    with torch.no_grad():
        both, one, other = (
            world.train.compute_loss(world.models, batch(world, numbers), world.cfg)[0].item()
            for numbers in ([0, 1], [0], [1])
        )
    assert both == pytest.approx((one + other) / 2, rel=1e-5) and abs(one - other) > 1e-4


def test_velocity_target_through_the_pipelines_scheduler(world):
    """Catches the target's sign and scale: one Euler step of the pipeline along the target from sigma 1 lands on the
    latents."""
    latents = encoded(world, 0)["latents"][None]
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    scheduler, pack = world.pipeline.scheduler, world.pipeline._pack_latents
    scheduler.set_timesteps(sigmas=[1.0])
    scheduler.set_begin_index(0)
    target = world.train.pack_latents(velocity_target(latents, noise))
    end = scheduler.step(target, scheduler.timesteps[0], pack(noise), return_dict=False)[0]
    torch.testing.assert_close(end, pack(latents), atol=1e-5, rtol=1e-4)


def test_empty_caption_is_the_encoded_one(world, settings):
    """Catches zeros in place of the encoded "" for caption dropout, and a share of dropped captions that is not the
    one asked for."""
    expected = world.pipeline.encode_prompt([""], max_sequence_length=LENGTH)[0][0]
    assert torch.equal(world.models.empty_prompt_embeds, expected) and expected.abs().sum() > 0
    samples = [{**encoded(world, p % 2), "step": 9, "position": p, "group_size": 40} for p in range(40)]
    world.spy.calls.clear()
    cfg = settings(seed=5, caption_dropout=0.25)
    with torch.no_grad():
        world.train.compute_loss(world.models, world.train.loader.collate(samples), cfg)
    (call,) = world.spy.calls
    empty = [torch.equal(embeds, expected) for embeds in call["encoder_hidden_states"]]
    for sample, dropped, embeds in zip(samples, empty, call["encoder_hidden_states"], strict=True):
        assert dropped or torch.equal(embeds, sample["prompt_embeds"].to(world.dtype))
    assert 3 <= sum(empty) <= 18, sum(empty)


# ---- latents


def test_batch_norm_statistics_normalise_and_stay(world):
    """Catches statistics of the batch in place of the running ones, a forgotten eps, and a VAE in training mode, which
    would move them."""
    vae = world.encoders.vae
    before = {name: value.clone() for name, value in vae.bn.state_dict().items()}
    pixels = image_to_tensor(picture(7, SIZE))
    (latents,) = world.encoders.images(pixels[None], moments=False)["latents"]
    reference(world, picture(8, TALL))
    assert not vae.training and not vae.bn.training and not any(p.requires_grad for p in vae.parameters())
    assert all(torch.equal(value, before[name]) for name, value in vae.bn.state_dict().items())
    with torch.no_grad():
        patches = world.pipeline._patchify_latents(vae.encode(pixels[None]).latent_dist.mode())
        torch.testing.assert_close(latents, vae.bn(patches)[0], atol=1e-5, rtol=1e-4)
    without_eps = (patches - vae.bn.running_mean.view(1, -1, 1, 1)) / vae.bn.running_var.sqrt().view(1, -1, 1, 1)
    assert (latents - without_eps[0]).norm() > 0.05 * latents.norm(), "this model's eps is too small to be missed"


def test_a_batch_is_its_rows(world):
    """Catches prompts whose padding is seen or kept, and rows of a batch that are mixed up."""
    only_float32(world)
    items = [(text, None) for text in (*PROMPTS, "", "a cross on the right")]
    sizes = {"pixels": SIZE, "reference_0": (64, 96), "reference_1": SIZE}
    read = [
        {name: image_to_tensor(picture(number + at, size)) for at, (name, size) in enumerate(sizes.items())}
        for number in range(0, 40, 10)
    ]
    assert_batch_is_rows(world.encoders, items, [dict(each) for each in read])
    assert_batch_is_rows(world.encoders, items, [{}] * 4)


def test_moments_give_the_posterior(world):
    """Catches a posterior whose standard deviation is patched or scaled otherwise than its mean is."""
    pixels, vae = image_to_tensor(picture(0, SIZE)), world.encoders.vae
    kept = first(world.encoders.images(pixels[None], moments=True))
    with torch.no_grad():
        posterior = vae.encode(pixels[None]).latent_dist
        lower, upper = (world.pipeline._patchify_latents(posterior.mode() + s * posterior.std) for s in (-1, 1))
        spread = (vae.bn(upper) - vae.bn(lower))[0] / 2
    torch.testing.assert_close(kept["posterior_std"], spread, atol=1e-5, rtol=1e-3)
    assert torch.equal(kept["latents"], world.encoders.images(pixels[None], moments=False)["latents"][0])


def test_decoding_undoes_encoding(world):
    """Catches the normalisation turned round: the pipeline decodes the recipe's latents to what the VAE
    reconstructs."""
    only_float32(world)
    vae = world.encoders.vae
    with torch.no_grad():
        pixels = image_to_tensor(picture(0, SIZE))
        direct = vae.decode(vae.encode(pixels[None]).latent_dist.mode()).sample
    packed = world.pipeline._pack_latents(encoded(world, 0)["latents"][None])

    def stay(pipeline, i, t, tensors):  # whatever the random transformer did, decode the given latents
        return {"latents": packed}

    drawn = world.pipeline(
        prompt=PROMPTS[:1], height=HEIGHT, width=WIDTH, sigmas=[0.5], guidance_scale=1.0,
        max_sequence_length=LENGTH, output_type="pt", callback_on_step_end=stay,
    ).images  # fmt: skip
    torch.testing.assert_close(drawn[0], (direct[0] / 2 + 0.5).clamp(0, 1), atol=1e-4, rtol=1e-4)


# ---- reference images


@pytest.mark.parametrize("sizes", [[TALL], [FLAT, TALL], [LARGE, TALL]], ids=["one", "two", "large"])
def test_references(world, sizes):
    """Catches references resized, cut, encoded, ordered or numbered (T = 10, 20) otherwise than by the pipeline."""
    if LARGE in sizes:
        only_float32(world)
    references = tuple(picture(20 + index, size) for index, size in enumerate(sizes))
    noisy, sigma = noisy_by_diffusers(world, [0])
    ours = call_of_loss(world, batch(world, [0], (references,)))
    pipelines = call_of_pipeline(world, PROMPTS[:1], noisy, sigma.item(), references)
    # float32: the VAE's rounding depends on the strides of its input, which differ
    assert_same_call(ours, pipelines, {"hidden_states": 2e-2})
    assert ours["img_ids"][0, :, 0].unique().tolist() == [0, 10, 20][: 1 + len(sizes)]
    if LARGE in sizes:
        assert (ours["img_ids"][0, :, 0] == 10).sum() == (1072 // 16) * (976 // 16), "shrunk, then cut to 16s"


def test_prediction_is_compared_with_the_target_token_by_token(world, monkeypatch):
    """Catches a target that is packed otherwise than the prediction or has the wrong sign, and a loss that looks at
    references: a prediction that is perfect on the target's tokens has loss zero, whatever it is on the others."""
    only_float32(world)
    made = batch(world, [0, 1], ((picture(30, TALL),), (picture(31, TALL),)))
    _, noise = drawn_noise(world, [0, 1])
    perfect = world.pipeline._pack_latents(noise - made["latents"])  # d noisy / d sigma, packed by the pipeline
    elsewhere = torch.full((2, made["reference_0"][0, 0].numel(), perfect.shape[-1]), 1e4)
    monkeypatch.setattr(world.models, "transformer", lambda **named: (torch.cat([perfect, elsewhere], dim=1),))
    loss, metrics = world.train.compute_loss(world.models, made, world.cfg)
    assert loss.item() < 1e-10 and metrics["samples"] == 2
    assert metrics["latents_mean"].item() == pytest.approx(made["latents"].mean().item())
    assert metrics["latents_std"].item() == pytest.approx(made["latents"].std().item())


def test_rows_of_a_batch_see_their_own_references(world):
    """Catches the first row's references used for the whole batch, and references in another order than the row's."""
    pairs = tuple((picture(40 + n, TALL), picture(50 + n, FLAT)) for n in (0, 1))
    both = call_of_loss(world, batch(world, [0, 1], pairs))["hidden_states"]
    for n in (0, 1):
        alone = call_of_loss(world, batch(world, [n], pairs[n : n + 1]))["hidden_states"]
        assert torch.equal(both[n], alone[0])
    assert not torch.equal(both[0, TOKENS:], both[1, TOKENS:])


def rows_with_sources(*sizes: tuple[tuple[int, int], ...]) -> list[Record]:
    return [Record(row=n, file_path="", text="", source_sizes=each) for n, each in enumerate(sizes)]


def test_a_batch_has_references_of_one_size(train):
    """Catches micro-batches that cannot be stacked, or that have one set of positions for unequal references."""
    # 90 x 70 and 80 x 64 are the same after the pipeline's cut; a target may have two, or none
    sizes = [((90, 70),), ((80, 64),), ((70, 90),), (), ((80, 64), (80, 64))] * 8
    records, buckets = rows_with_sources(*sizes), [(96, 96)] * 40
    kinds = [tuple((w // 16, h // 16) for w, h in each) for each in sizes]
    shape_ids = train.reference_images.shapes(records)
    sampler = MicroBatchSampler(buckets, 2, 4, 0, 1, seed=0, shape_ids=shape_ids)
    seen = [{kinds[place.sample] for place in micro_batch} for micro_batch in itertools.islice(sampler, 60)]
    assert all(len(each) == 1 for each in seen) and len(set.union(*seen)) == 4
    assert any(len(set.union(*seen[start : start + 4])) > 1 for start in range(0, 60, 4)), "a step may have several"
    assert shape_ids[0] == shape_ids[1]
    assert train.reference_images.shapes(rows_with_sources((), ())) is None


@pytest.mark.parametrize(("size", "is_good"), [((63, 80), False), ((64, 513), False), ((512, 64), True)])
def test_references_that_the_pipeline_refuses_are_named(
    train, settings, model_folder, tmp_path, monkeypatch, size, is_good
):
    """Catches a reference too small or too long for the pipeline that is found out when it first draws, hours
    later."""
    picture(0, SIZE).save(tmp_path / "target.png")
    picture(1, TALL).save(tmp_path / "good.png")
    picture(2, size).save(tmp_path / "edge.png")
    rows = [{"file_path": "target.png", "text": "a cross", "source_file_path": [p]} for p in ("good.png", "edge.png")]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    run = SimpleNamespace(rank=0, world_size=1, is_main=True)

    class ReachedEncoding(Exception):
        pass

    def reach(run, embeddings, items, encode):
        raise ReachedEncoding([row for row, bucket in items.values() if bucket])

    def checked(**values: str) -> list[Record]:
        """The rows that are left to be encoded."""
        cfg = settings(train_data_dir=tmp_path, output_dir=tmp_path / "out", num_validation_samples=0, **values)
        with pytest.raises(ReachedEncoding) as reached:
            train.prepare_data(cfg, run, model_folder)
        return reached.value.args[0]

    monkeypatch.setattr(train.cache, "encode_missing", reach)
    if is_good:
        assert [record.source_sizes for record in checked()] == [(TALL,), (size,)]
        return
    width, height = size
    with pytest.raises(ValueError, match=rf"train.json row 1: .*edge.png.* is {width} x {height}; .*64.*8 : 1"):
        checked()
    assert [record.row for record in checked(on_bad_rows="skip")] == [0]


# ---- timestep shift


def test_flux1_rule_is_the_schedulers_line(world, settings):
    """Catches the linear rule with other ends: mu 0.5 at 256 tokens, 1.15 at 4096; and sigmas shifted otherwise than
    by the scheduler."""
    cfg, config = world.cfg, world.models.scheduler_config
    assert cfg.shift_rule == "flux1"
    for tokens, mu in ((256, 0.5), (4096, 1.15), (1024, 0.63)):
        assert math.log(world.train.sigma_shift(cfg, config, tokens)) == pytest.approx(mu, abs=1e-6)
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    sigmas = torch.tensor([0.9, 0.5, 0.1])
    scheduler.set_timesteps(sigmas=sigmas.tolist(), mu=1.15)
    ours = shift_sigmas(sigmas, world.train.sigma_shift(cfg, config, 4096))
    torch.testing.assert_close(ours, scheduler.sigmas[:-1], atol=1e-6, rtol=1e-5)
    for flags, shift in (({}, world.train.sigma_shift(cfg, config, 4096)), ({"timestep_shift": 3.0}, 3.0)):
        chosen = settings(timestep_sampling="uniform", **flags)
        drawn = draw_sigmas(sigmas, chosen.flow, world.train.sigma_shift(chosen, config, 4096))
        assert torch.equal(drawn, shift_sigmas(sigmas, shift))


@pytest.mark.parametrize("references", [(), (TALL,)], ids=["text", "reference"])
def test_empirical_rule_is_the_pipelines(world, settings, monkeypatch, references):
    """Catches an empirical mu of other tokens (references do not count) or steps than the pipeline's own."""
    only_float32(world)
    given, set_timesteps = {}, world.pipeline.scheduler.set_timesteps

    @functools.wraps(set_timesteps)  # the pipeline looks at the names of its arguments
    def spying(*positional, **named):
        given.update(named)
        return set_timesteps(*positional, **named)

    monkeypatch.setattr(world.pipeline.scheduler, "set_timesteps", spying)
    world.pipeline(
        image=[picture(1, size) for size in references] or None, prompt=PROMPTS[1], height=HEIGHT, width=WIDTH,
        num_inference_steps=2, guidance_scale=1.0, max_sequence_length=LENGTH, output_type="latent",
    )  # fmt: skip
    cfg = settings(shift_rule="empirical", num_inference_steps=2, caption_dropout=0)
    used = []
    rule = world.train.sigma_shift
    monkeypatch.setattr(world.train, "sigma_shift", lambda *args: used.append(rule(*args)) or used[-1])
    made = batch(world, [0], (tuple(picture(1, size) for size in references),))
    with torch.no_grad():
        world.train.compute_loss(world.models, made, cfg)
    assert math.log(used[0]) == pytest.approx(given["mu"], rel=1e-6)


# ---- FLOPs


def counted_flops(model: Flux2Transformer2DModel, tokens: int, prompt_tokens: int) -> float:
    """What torch counts in one forward on the meta device."""
    config = model.config
    with FlopCounterMode(display=False) as counter, torch.device("meta"), torch.no_grad():
        model(
            hidden_states=torch.empty(1, tokens, config.in_channels),
            encoder_hidden_states=torch.empty(1, prompt_tokens, config.joint_attention_dim),
            timestep=torch.empty(1),
            img_ids=torch.empty(1, tokens, 4),
            txt_ids=torch.empty(1, prompt_tokens, 4),
        )
    return counter.get_total_flops()


def test_forward_flops_are_those_that_torch_counts(train, recipe, world):
    """Catches an MFU that is computed from a wrong number of operations, and one that forgets the references."""
    only_float32(world)
    with torch.device("meta"):
        full = Flux2Transformer2DModel.from_config(part_config(recipe / "full_size/transformer"))
        small = Flux2Transformer2DModel.from_config(world.models.config)
    flops = train.forward_flops(dict(full.config), 4096, 512)
    assert flops == pytest.approx(75.5e12, rel=0.005)
    assert flops == pytest.approx(counted_flops(full, 4096, 512), rel=0.002)
    made = batch(world, [0, 1], ((picture(1, TALL),), (picture(2, TALL),)))
    with torch.no_grad():
        _, metrics = train.compute_loss(world.models, made, world.cfg)
    tokens = TOKENS + made["reference_0"][0, 0].numel()
    assert metrics["forward_flops"] == pytest.approx(2 * counted_flops(small, tokens, LENGTH), rel=0.02)


def test_the_held_out_loss_sees_references(train, monkeypatch):
    """Catches a held-out loss without the row's reference images: they would seem not to help."""
    seen = []

    def predict_velocity(models, noisy_latents, sigma, batch):
        seen.append([reference.shape for reference in train.reference_images.of_batch(batch)])
        return train.pack_latents(noisy_latents)

    monkeypatch.setattr(train, "predict_velocity", predict_velocity)
    rows = [{"latents": torch.zeros(128, 4, 4), "prompt_embeds": torch.zeros(2, 8)} for _ in range(2)]
    rows[1] |= {"reference_0": torch.ones(128, 2, 4), "reference_1": torch.ones(128, 4, 4)}
    run = SimpleNamespace(
        in_step=lambda items: ((index, item, 1) for index, item in enumerate(items)), device=torch.device("cpu")
    )
    errors = train.held_out_errors(run, train.Config(), None, SimpleNamespace(held_out=rows))
    assert len(errors) == len(seen) and seen[0] == [] and seen[-1] == [(1, 128, 2, 4), (1, 128, 4, 4)]
