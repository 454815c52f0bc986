"""common/model/streaming.py and activations.py: blocks in main memory train as resident ones do, to the last bit."""

import functools
from collections.abc import Callable

import pytest
import torch
from diffusers import Flux2Transformer2DModel, QwenImageTransformer2DModel
from torch import nn

from common.model import streaming
from common.model.activations import Activations
from common.model.slots import Slots
from common.step.optimizers import Adafactor, GradientRelease

CPU = torch.device("cpu")
gpu = pytest.mark.gpu


def qwenimage(dtype: torch.dtype, width: int = 2, layers: int = 7) -> nn.Module:
    sizes = dict(attention_head_dim=32, joint_attention_dim=64, axes_dims_rope=(8, 12, 12))
    return filled(QwenImageTransformer2DModel(num_layers=layers, num_attention_heads=width, **sizes), dtype)


def klein(dtype: torch.dtype) -> nn.Module:
    """Dual and single blocks, which differ in size, and modulation that all blocks share."""
    sizes = dict(num_layers=2, num_single_layers=5, attention_head_dim=32, num_attention_heads=2)
    sizes |= dict(in_channels=64, joint_attention_dim=64, axes_dims_rope=(8, 8, 8, 8), guidance_embeds=False)
    return filled(Flux2Transformer2DModel(**sizes), dtype)


def filled(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    rng = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data = (torch.randn(p.shape, generator=rng) * 0.05).to(dtype)
    return model.train()


def inputs(model: nn.Module, step: int, device: torch.device) -> dict:
    rng = torch.Generator().manual_seed(step)
    tokens = {name: torch.randn(2, n, 64, generator=rng) for name, n in (("image", 16), ("text", 9))}
    tokens = {name: tensor.to(device, next(model.parameters()).dtype) for name, tensor in tokens.items()}
    values = {"hidden_states": tokens["image"], "encoder_hidden_states": tokens["text"], "return_dict": False}
    values["timestep"] = torch.rand(2, generator=rng).to(device, tokens["image"].dtype)
    if isinstance(model, QwenImageTransformer2DModel):
        return values | {"encoder_hidden_states_mask": None, "img_shapes": [[(1, 4, 4)]] * 2}
    image_ids = torch.cartesian_prod(torch.arange(1), torch.arange(4), torch.arange(4), torch.arange(1))
    text_ids = torch.cartesian_prod(*[torch.arange(1)] * 3, torch.arange(9))
    ids = {"img_ids": image_ids.expand(2, -1, -1).to(device), "txt_ids": text_ids.expand(2, -1, -1).to(device)}
    return values | ids | {"guidance": None}


def train(model: nn.Module, steps: range, device: torch.device = CPU) -> list[float]:
    losses = []
    for step in steps:
        torch.manual_seed(step)  # stochastic rounding
        loss = model(**inputs(model, step, device))[0].float().pow(2).mean()
        loss.backward()
        losses.append(loss.item())
    return losses


def adafactor(model: nn.Module) -> torch.optim.Optimizer:
    return Adafactor(model.parameters(), lr=1e-2)


def flash_adamw(model: nn.Module) -> torch.optim.Optimizer:
    """Plain AdamW on a CPU, 24-bit masters and 8-bit moments on a GPU."""
    flashoptim = pytest.importorskip("flashoptim")
    if next(model.parameters()).is_cuda:
        return flashoptim.FlashAdamW(model.parameters(), lr=1e-3, master_weight_bits=24)
    return flashoptim.FlashAdamW(model.parameters(), lr=1e-3, quantize=False, fused=False, master_weight_bits=None)


def resident(model: nn.Module, make: Callable) -> tuple[nn.Module, torch.optim.Optimizer]:
    model.enable_gradient_checkpointing()
    optimizer = make(model)
    released(model, optimizer)
    return model, optimizer


def released(model: nn.Module, optimizer: torch.optim.Optimizer) -> GradientRelease:
    return GradientRelease(optimizer, [list(block.parameters()) for block in streaming.repeated_blocks(model)])


@functools.cache
def resident_run(build: Callable, make: Callable, dtype: torch.dtype) -> tuple[tuple, list[float]]:
    """Model and optimizer after ten steps with everything in place, and the losses."""
    trained = resident(build(dtype), make)
    return trained, train(trained[0], range(10))


def streamed(
    model: nn.Module, make: Callable, blocks: int, device: torch.device = CPU, offload: bool = False
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The same model with so many blocks in main memory (-1: all), as load_model makes it."""
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    streamer = streaming.stream(model, blocks, device, next(model.parameters()).dtype, None)
    with streaming.at_home(model), torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(weights[name])
    function = streamer.checkpointed(lambda module, *args: module(*args))
    model.enable_gradient_checkpointing(Activations(device).offloading(function) if offload else function)
    optimizer = make(model)
    streaming.bind(model, optimizer, released(model, optimizer))
    return model, optimizer


def assert_equal(one: tuple[nn.Module, torch.optim.Optimizer], two: tuple[nn.Module, torch.optim.Optimizer]) -> None:
    """Weights and optimizer state, bit for bit; `two` streams."""
    with streaming.at_home(two[0]):
        for (name, a), (_, b) in zip(one[0].named_parameters(), two[0].named_parameters(), strict=True):
            assert torch.equal(a.cpu(), b.cpu()), name
        ours, theirs = (optimizer.state_dict()["state"] for optimizer in (two[1], one[1]))
        assert ours.keys() == theirs.keys() and theirs
        for index, state in theirs.items():
            assert ours[index].keys() == state.keys()
            for name, value in state.items():
                assert torch.equal(torch.as_tensor(ours[index][name]).cpu(), torch.as_tensor(value).cpu()), name


@pytest.mark.parametrize("blocks", [-1, 3, 1])
@pytest.mark.parametrize("make", [adafactor, flash_adamw])
@pytest.mark.parametrize("build", [qwenimage, klein])
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)],
    ids=["float32", "bfloat16"],
)
def test_streamed_equals_resident(build, make, dtype, blocks):
    """Catches a block that computes with another's weights, or an update that does not come home: losses, weights and
    optimizer state are equal to the last bit over ten steps."""
    one, losses = resident_run(build, make, dtype)
    two = streamed(build(dtype), make, blocks)
    assert losses == train(two[0], range(10))
    assert_equal(one, two)


def test_offloaded_activations_are_the_same(monkeypatch):
    """Catches inputs of blocks that come back in another order, or buffers that are used twice."""
    monkeypatch.setattr("common.model.activations.SMALLEST", 64)
    one = resident(qwenimage(torch.float32), adafactor)
    two = streamed(qwenimage(torch.float32), adafactor, -1, offload=True)
    assert train(one[0], range(5)) == train(two[0], range(5))
    assert_equal(one, two)


def test_three_blocks_are_on_the_device_at_once():
    """Catches blocks that stay: all parameters that stream share the memory of three slots."""
    model, _ = streamed(qwenimage(torch.float32), adafactor, -1)
    train(model, range(2))
    blocks = [list(block.parameters()) for block in streaming.repeated_blocks(model)]
    places = {parameters[0].untyped_storage().data_ptr() for parameters in blocks}
    assert len(blocks) == 7 and len(places) == 3
    assert all(len({p.untyped_storage().data_ptr() for p in parameters}) == 1 for parameters in blocks)


def test_goes_on_after_reading_and_loading_anew():
    """Catches state that is lost or doubled when optimizer state is saved and loaded between two steps."""
    one, two = resident(qwenimage(torch.float32), flash_adamw), streamed(qwenimage(torch.float32), flash_adamw, 4)
    assert train(one[0], range(3)) == train(two[0], range(3))
    with streaming.at_home(two[0]):
        saved = {name: p.detach().clone() for name, p in two[0].named_parameters()}
        moments = two[1].state_dict()
        moments = {**moments, "state": {i: {k: _copy(v) for k, v in s.items()} for i, s in moments["state"].items()}}
    train(two[0], range(50, 52))
    with streaming.at_home(two[0]), torch.no_grad():
        for name, p in two[0].named_parameters():
            p.copy_(saved[name])
        two[1].load_state_dict(moments)
    assert train(one[0], range(3, 6)) == train(two[0], range(3, 6))
    assert_equal(one, two)


def _copy(value: object) -> object:
    return value.clone() if isinstance(value, torch.Tensor) else value


def test_validation_between_steps_changes_nothing():
    """Catches a forward without gradients that leaves slots in another state than a step expects."""
    one, two = resident(qwenimage(torch.float32), adafactor), streamed(qwenimage(torch.float32), adafactor, -1)
    losses = []
    for step in range(4):
        assert train(one[0], range(step, step + 1)) == train(two[0], range(step, step + 1))
        with torch.no_grad():
            losses.append([model(**inputs(model, 99, CPU))[0].sum().item() for model, _ in (one, two)])
    assert all(a == b for a, b in losses)
    assert_equal(one, two)


def test_frozen_blocks_stream_read_only():
    """Catches a frozen base that is copied back, or adapters that leave the device: what trains stays."""
    model = qwenimage(torch.float32).requires_grad_(False)
    for block in streaming.repeated_blocks(model):
        block.attn.to_q.bias.requires_grad_(True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    weights = dict(before)
    streamer = streaming.stream(model, -1, CPU, torch.float32, torch.float32)
    with streaming.at_home(model), torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(weights[name])
    model.enable_gradient_checkpointing(streamer.checkpointed(lambda module, *args: module(*args)))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    streaming.bind(model, optimizer, None)
    for step in range(3):
        model(**inputs(model, step, CPU))[0].pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not streamer.writes
    with streaming.at_home(model):
        for name, p in model.named_parameters():
            trained = name.endswith("attn.to_q.bias")
            assert torch.equal(p, before[name]) != trained, name


# ---- on a GPU, where copies and computation overlap


@gpu
@pytest.mark.parametrize("make", [adafactor, flash_adamw])
@pytest.mark.parametrize("offload", [False, True], ids=["", "activations"])
def test_streamed_equals_resident_on_a_gpu(make, offload, monkeypatch):
    """Catches a missing wait between copies and computation, and quantised state that comes home damaged."""
    monkeypatch.setattr("common.model.activations.SMALLEST", 64)
    one, two = on_a_gpu(make, offload)
    assert train(one[0], range(20), torch.device("cuda")) == train(two[0], range(20), torch.device("cuda"))
    assert_equal(one, two)


@gpu
@pytest.mark.parametrize("missing", ["arrived", "used", "written"])
def test_a_missing_wait_is_caught(missing, monkeypatch):
    """The proof of the test above: without one of the waits, and with slow copies, losses differ."""
    device = torch.device("cuda")
    fetch, release = Slots.fetch, Slots.release

    def slow_fetch(slots: Slots, group: int) -> None:
        if slots.holds[group % slots.n_slots] != group:
            with torch.cuda.stream(slots.up):
                torch.cuda._sleep(3_000_000)
            if missing == "used":
                slots.used.clear()
                slots.saved.clear()
            if missing == "written":
                slots.written.clear()
                slots.saved.clear()
        fetch(slots, group)

    def slow_release(slots: Slots, group: int, write: bool) -> None:
        with torch.cuda.stream(slots.down):
            torch.cuda._sleep(30_000_000 if missing == "written" else 0)
        release(slots, group, write)

    def take_without_waiting(slots: Slots, group: int) -> None:
        slots.fetch(group)

    one, two = on_a_gpu(adafactor, offload=False)
    monkeypatch.setattr(Slots, "fetch", slow_fetch)
    monkeypatch.setattr(Slots, "release", slow_release)
    if missing == "arrived":
        monkeypatch.setattr(Slots, "take", take_without_waiting)
    assert train(one[0], range(20), device) != train(two[0], range(20), device)


def on_a_gpu(make: Callable, offload: bool) -> tuple:
    """A resident and a streamed model that are wide enough for copies to take time."""
    device = torch.device("cuda")
    one = resident(qwenimage(torch.bfloat16, width=16).to(device), make)
    two = streamed(qwenimage(torch.bfloat16, width=16).to(device), make, -1, device, offload)
    return one, two
