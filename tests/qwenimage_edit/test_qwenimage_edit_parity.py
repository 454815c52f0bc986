"""The transformer is called in training as the unmodified QwenImageEditPlusPipeline and QwenImageEditPipeline call it:
same names, shapes, dtypes, values, from the manifest on."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImageTransformer2DModel,
)
from parity import Spy, assert_same_call, call_of_loss, first, mixed, picture
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from common.data.known_files import KnownFiles
from common.data.loader import collate
from common.data.order import Place
from common.step.flow_matching import (
    draw_normal,
    draw_uniform,
    sample_rngs,
    sample_sigmas,
    shift_sigmas,
    velocity_target,
)

WIDTH, HEIGHT = 128, 64  # of targets; not square: a swap of the two fails
SIDE = 32  # pixels of a token of the fine model
TOKENS = (WIDTH // SIDE) * (HEIGHT // SIDE)
STEP = 3
SOURCES = {"wide.png": (640, 320), "tall.png": (150, 200), "flat.png": (320, 160)}  # (width, height)
GRID = {"wide.png": (1440, 736), "tall.png": (896, 1184), "flat.png": (1440, 736)}  # what the pipelines make of them
ROWS = [
    ("make the circle red, as it was", ["wide.png"]),
    ("a cross", ["flat.png"]),
    ("turn the square blue", ["tall.png", "wide.png"]),
]
KINDS = {  # pipeline, transformer's config, precision
    "plus": (QwenImageEditPlusPipeline, {}, "no"),
    "edit": (QwenImageEditPipeline, {}, "no"),
    "plus-zero_cond_t": (QwenImageEditPlusPipeline, {"zero_cond_t": True}, "no"),
    "plus-bf16": (QwenImageEditPlusPipeline, {}, "bf16"),
}


def target(number: int) -> Image.Image:
    return picture(number, (WIDTH, HEIGHT))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Targets, sources and the manifests of both modes."""
    folder = tmp_path_factory.mktemp("parity")
    for number, (name, size) in enumerate(SOURCES.items()):
        picture(10 + number, size).save(folder / name)
    rows = []
    for number, (text, sources) in enumerate(ROWS):
        target(number).save(folder / f"{number}.png")
        rows.append({"file_path": f"{number}.png", "source_file_path": sources, "text": text, "type": "image"})
    (folder / "plus.json").write_text(json.dumps(rows))
    (folder / "edit.json").write_text(json.dumps(rows[:2]))
    return folder


@pytest.fixture(scope="module")
def world_of(train, settings, make_tiny, write_model, fine_folder, folder, process, tmp_path_factory):
    """world_of(kind): the rows as the recipe's data set gives them, its models, and the unmodified pipeline with a spy
    on the transformer that both use. Made when first asked for."""
    made: dict[str, SimpleNamespace] = {}

    def make(kind: str) -> SimpleNamespace:
        pipeline_class, more, precision = KINDS[kind]
        model = write_model(4, heads=2, num_layers=1, **more) if more else fine_folder
        mode = "qwen_image_edit_plus" if pipeline_class is QwenImageEditPlusPipeline else "qwen_image_edit"
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        cfg = settings(
            train_data_dir=folder,
            train_data_meta=f"{'plus' if 'plus' in kind else 'edit'}.json",
            output_dir=tmp_path_factory.mktemp(kind),
            train_mode=mode,
            image_sample_size=96,
            num_validation_samples=0,
            mixed_precision=precision,
            caption_dropout=0.25,
            seed=5,
        )
        run = process(dtype)
        cache = train.encoding.open_cache(cfg, run, model)
        rows, _ = train.edits.load_rows(cfg, run, train.token_side(cfg, model), KnownFiles())
        wanted = train.encoding.what_to_encode(cfg, cache, [(rows, set(rows.first_views(cfg)))], [])
        train.encoding.encode_missing(cfg, run, model, cache, wanted)
        # a schedule without shift and stretch, so that the pipeline can be told which sigma to use
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(
            model / "scheduler", use_dynamic_shifting=False, shift_terminal=None, shift=1.0
        )
        pipeline = pipeline_class.from_pretrained(model, scheduler=scheduler, dtype=dtype)
        make_tiny.convolve_single_frames(pipeline.vae)
        pipeline.set_progress_bar_config(disable=True)
        spy = Spy(pipeline.transformer)
        models = train.Models(
            transformer=pipeline.transformer,
            config=dict(pipeline.transformer.config),
            scheduler_config=FlowMatchEulerDiscreteScheduler.load_config(model / "scheduler"),
            device=run.device,
            dtype=dtype,
        )
        dataset = train.encoding.EncodedEdits(cfg, rows, cache)
        return SimpleNamespace(
            train=train, cfg=cfg, rows=rows, dataset=dataset, pipeline=pipeline, spy=spy, models=models, dtype=dtype
        )

    return lambda kind: made[kind] if kind in made else made.setdefault(kind, make(kind))


@pytest.fixture(scope="module")
def world(world_of) -> SimpleNamespace:
    return world_of("plus")


def sources_of_row(folder: Path, number: int) -> list[Image.Image]:
    return [Image.open(folder / name) for name in ROWS[number][1]]


def batch(world: SimpleNamespace, numbers: list[int], positions: list[int] | None = None) -> dict:
    """A micro-batch of step 3 as the loader makes it. Positions: places in the step at which no caption is dropped."""
    positions = positions or kept_positions(world)[: len(numbers)]
    places = [Place(n, STEP, position, tuple(range(40))) for n, position in zip(numbers, positions, strict=True)]
    return collate([world.dataset[place] for place in places])


def kept_positions(world: SimpleNamespace) -> list[int]:
    """Of 40 places in step 3, those whose caption stays."""
    return [p for p in range(40) if drawn(world, [p])[1].item() >= world.cfg.pictures.caption_dropout]


def drawn(world: SimpleNamespace, positions: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(uniform numbers of sigma and of dropout, each (B,), noise (B, 16, 1, 4, 8)) of step 3."""
    rngs = sample_rngs(world.cfg.run.seed, STEP, positions)
    return draw_uniform(rngs), draw_uniform(rngs), draw_normal(rngs, (16, 1, 2 * HEIGHT // SIDE, 2 * WIDTH // SIDE))


def noisy_by_diffusers(world: SimpleNamespace, number: int, position: int) -> tuple[torch.Tensor, float]:
    """(packed noisy latents (1, S, 64), sigma) of the same random numbers, encoded and mixed by diffusers' means."""
    pipeline = world.pipeline
    pixels = pipeline.image_processor.preprocess(target(number)).to(pipeline.vae.dtype)  # (1, 3, H, W)
    with torch.no_grad():
        latents = pipeline._encode_vae_image(pixels[:, :, None], generator=None).float()
    uniform, _, noise = drawn(world, [position])
    mu = 0.5 + (0.9 - 0.5) * (TOKENS - 256) / (8192 - 256)
    sigma = shift_sigmas(sample_sigmas(uniform, "logit_normal"), math.exp(mu)).double().item()
    noisy = mixed(pipeline.scheduler, latents, sigma, noise)
    return pipeline._pack_latents(noisy, 1, 16, *noisy.shape[-2:]), sigma


def call_of_pipeline(world: SimpleNamespace, number: int, folder: Path, noisy: torch.Tensor, sigma: float) -> dict:
    world.spy.calls.clear()
    images = sources_of_row(folder, number)
    world.pipeline(
        image=images if isinstance(world.pipeline, QwenImageEditPlusPipeline) else images[0], prompt=ROWS[number][0],
        latents=noisy.to(world.dtype), sigmas=[sigma], height=HEIGHT, width=WIDTH, true_cfg_scale=1.0,
        output_type="latent",
    )  # fmt: skip
    (call,) = world.spy.calls
    return call


# ---- the call


@pytest.mark.parametrize(
    ("kind", "number"),
    [
        ("plus", 0),
        ("plus", 2),
        pytest.param("edit", 0, marks=pytest.mark.slow),
        pytest.param("edit", 1, marks=pytest.mark.slow),
        pytest.param("plus-zero_cond_t", 2, marks=pytest.mark.slow),
        pytest.param("plus-bf16", 0, marks=pytest.mark.slow),
    ],
)
def test_one_sample(world_of, folder, kind, number):
    """Catches a wrong template, sources resized, encoded, normalised, ordered or placed otherwise than by the
    pipelines, another mixing, packing, timestep scale or dtype."""
    world = world_of(kind)
    position = 4  # of those whose caption stays; here sigma and sigma * 1000 / 1000 differ in bf16
    ours = call_of_loss(world, batch(world, [number], [position]))
    noisy, sigma = noisy_by_diffusers(world, number, position)
    pipelines = call_of_pipeline(world, number, folder, noisy, sigma)
    limits = {"hidden_states": 1e-5}
    if world.dtype == torch.bfloat16:  # the pipeline's VAE computes in bf16 too, the recipe's in float32
        limits = {"hidden_states": 0.25}
    assert_same_call(ours, pipelines, limits)
    sizes = [(WIDTH, HEIGHT), *(GRID[name] for name in ROWS[number][1])]
    assert ours["img_shapes"] == [[(1, height // SIDE, width // SIDE) for width, height in sizes]]
    assert ours["encoder_hidden_states_mask"] is None and 0 < ours["timestep"].item() <= 1
    assert world.pipeline.transformer.config.zero_cond_t == ("zero_cond_t" in kind)


def test_rows_of_a_batch_see_their_own_sources(world):
    """Catches the first row's sources or prompt used for the whole batch, and padding that is not masked."""
    made = batch(world, [0, 1])
    both = call_of_loss(world, made)
    assert not torch.equal(both["hidden_states"][0, TOKENS:], both["hidden_states"][1, TOKENS:])
    assert len(both["img_shapes"]) == 2 and both["img_shapes"][0] == both["img_shapes"][1]
    lengths = both["encoder_hidden_states_mask"].sum(1).tolist()
    assert lengths == [len(prompt) for prompt in made["prompt_embeds"]] and lengths[0] > lengths[1]
    for which, position in enumerate(kept_positions(world)[:2]):
        alone = call_of_loss(world, batch(world, [which], [position]))
        assert torch.equal(both["hidden_states"][which], alone["hidden_states"][0])
        embeds = both["encoder_hidden_states"][which]
        assert torch.equal(embeds[: lengths[which]], alone["encoder_hidden_states"][0])
        assert alone["encoder_hidden_states_mask"] is None
    with torch.no_grad():
        losses = [world.train.compute_loss(world.models, each, world.cfg)[0].item() for each in (made, *(
            batch(world, [which], [position]) for which, position in enumerate(kept_positions(world)[:2])
        ))]  # fmt: skip
    assert losses[0] == pytest.approx((losses[1] + losses[2]) / 2, rel=1e-5) and abs(losses[1] - losses[2]) > 1e-4


def test_velocity_is_that_of_the_targets_tokens(world):
    """Catches a slice that begins elsewhere, or holds the sources' tokens."""
    made = batch(world, [2])
    world.spy.results.clear()
    noisy = torch.randn(made["latents"].shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        velocity = world.train.predict_velocity(
            world.models, noisy, torch.tensor([0.5]), made["prompt_embeds"], world.train.sources_of(made)
        )
    (result,) = world.spy.results
    in_sources = sum(width * height for width, height in (GRID[name] for name in ROWS[2][1])) // SIDE**2
    assert result.shape == (1, TOKENS + in_sources, 64)
    assert torch.equal(velocity, result[:, :TOKENS])


def test_the_loss_ignores_sources_and_knows_the_sign(world, monkeypatch):
    """Catches a target that is packed otherwise than the prediction or has the wrong sign, and a loss that looks at
    source tokens: a prediction that is perfect on the target's tokens has loss zero, whatever it is on the others."""
    made = batch(world, [0, 1])
    _, _, noise = drawn(world, kept_positions(world)[:2])
    perfect = world.pipeline._pack_latents(noise - made["latents"], 2, 16, *noise.shape[-2:])
    elsewhere = torch.full((2, made["source_0"][0, 0].numel() // 4, 64), 1e4)
    monkeypatch.setattr(world.models, "transformer", Perfect(torch.cat([perfect, elsewhere], dim=1)))
    loss, metrics = world.train.compute_loss(world.models, made, world.cfg)
    assert loss.item() < 1e-10 and metrics["samples"] == 2
    assert metrics["latents_mean"].item() == pytest.approx(made["latents"].mean().item())
    assert metrics["latents_std"].item() == pytest.approx(made["latents"].std().item())


class Perfect(torch.nn.Module):
    """Predicts what it was given."""

    def __init__(self, prediction: torch.Tensor):
        super().__init__()
        self.prediction = torch.nn.Parameter(prediction, requires_grad=False)

    def forward(self, **named: object) -> tuple[torch.Tensor]:
        return (self.prediction,)


def test_target_through_the_pipelines_scheduler(world):
    """Catches the target's sign and scale: one Euler step of the pipeline along the target from sigma 1 lands on the
    latents."""
    latents = batch(world, [0])["latents"]
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    scheduler, shape = world.pipeline.scheduler, (1, 16, *latents.shape[-2:])
    scheduler.set_timesteps(sigmas=[1.0])
    scheduler.set_begin_index(0)
    start = world.pipeline._pack_latents(noise, *shape)
    along = world.train.pack_latents(velocity_target(latents, noise))
    end = scheduler.step(along, scheduler.timesteps[0], start, return_dict=False)[0]
    torch.testing.assert_close(end, world.pipeline._pack_latents(latents, *shape), atol=1e-5, rtol=1e-4)


# ---- captions that are dropped


@pytest.mark.parametrize("kind", ["plus", pytest.param("edit", marks=pytest.mark.slow)])
def test_a_dropped_caption_keeps_its_sources(world_of, folder, kind):
    """Catches zeros, an empty prompt without the row's sources or of another row, and another share than asked for."""
    world, dropped = world_of(kind), []
    for number in range(len(world.rows.records)):
        images = sources_of_row(folder, number)
        if kind == "edit":
            side = [round(edge / 32) * 32 for edge in (1024 * math.sqrt(2), 1024 / math.sqrt(2))]
            images = world.pipeline.image_processor.resize(images[0], side[1], side[0])
        else:
            sizes = [(round(384 * (w / h) ** 0.5 / 32) * 32, round(384 * (h / w) ** 0.5 / 32) * 32) for w, h in (
                image.size for image in images
            )]  # fmt: skip
            images = [world.pipeline.image_processor.resize(image, h, w) for image, (w, h) in zip(images, sizes)]
        with torch.no_grad():
            empty, full = (world.pipeline.encode_prompt([text], images)[0][0] for text in (" ", ROWS[number][0]))
        for position in range(40):
            embeds = world.dataset[Place(number, STEP, position, tuple(range(40)))]["prompt_embeds"]
            dropped.append(torch.equal(embeds, empty))
            assert dropped[-1] or torch.equal(embeds, full)
            assert dropped[-1] == (position not in kept_positions(world))
    assert 0.1 < sum(dropped) / len(dropped) < 0.45


# ---- latents


def test_moments_give_the_posterior(encoding, world, fine_folder):
    """Catches a posterior whose standard deviation is not divided by latents_std as its mean is."""
    encoders = encoding.Encoders(world.cfg, fine_folder, torch.device("cpu"), torch.float32)
    pixels = encoding.image_to_tensor(target(0))
    kept = first(encoders.latents(pixels[None], moments=True))
    with torch.no_grad():
        posterior = encoders.vae.encode(pixels[None, :, None]).latent_dist
    for c in range(16):
        mean, std = encoders.vae.config.latents_mean[c], encoders.vae.config.latents_std[c]
        torch.testing.assert_close(kept["latents"][c], (posterior.mode()[0, c] - mean) / std)
        torch.testing.assert_close(kept["posterior_std"][c], posterior.std[0, c] / std)


# ---- FLOPs


def counted_flops(model: QwenImageTransformer2DModel, grids: list[tuple[int, int]], prompt_tokens: int) -> float:
    """What torch counts in one forward on the meta device; grids: tokens (height, width) of each image."""
    tokens = sum(height * width for height, width in grids)
    with FlopCounterMode(display=False) as counter, torch.device("meta"), torch.no_grad():
        model(
            hidden_states=torch.empty(1, tokens, model.config.in_channels),
            encoder_hidden_states=torch.empty(1, prompt_tokens, model.config.joint_attention_dim),
            timestep=torch.empty(1),
            img_shapes=[[(1, *grid) for grid in grids]],
        )
    return counter.get_total_flops()


def test_forward_flops_are_those_that_torch_counts(train):
    """Catches an MFU that is computed from a wrong number of operations, and one that forgets the sources."""
    with torch.device("meta"):
        full = QwenImageTransformer2DModel(num_layers=2)
    config = dict(full.config)
    assert train.forward_flops({**config, "num_layers": 60}, 4096, 256) == pytest.approx(73.1e12, rel=0.005)
    for grids in ([(64, 64)], [(64, 64), (46, 90)]):
        tokens = sum(height * width for height, width in grids)
        expected = counted_flops(full, grids, 256)
        assert train.forward_flops(config, tokens, 256) == pytest.approx(expected, rel=0.01)


def test_flops_of_a_batch_count_its_sources(world):
    """Catches sources that are left out of a step's FLOPs."""
    made = batch(world, [2])
    with torch.no_grad():
        _, metrics = world.train.compute_loss(world.models, made, world.cfg)
    tokens = TOKENS + sum(made[f"source_{which}"][0, 0].numel() // 4 for which in range(2))
    expected = world.train.forward_flops(world.models.config, tokens, len(made["prompt_embeds"][0]))
    assert metrics["forward_flops"] == expected and tokens > 2000
