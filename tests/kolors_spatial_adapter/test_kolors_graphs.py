"""CUDA graphs of the UNet give what the UNet gives: losses and gradients of several steps."""

import importlib

import pytest
import torch
from test_kolors_modes import MODES, make_batch, model  # noqa: F401 (model is a fixture)

STEPS = 3


def train_a_little(model, batches, names) -> tuple[list, list]:  # noqa: F811
    """Losses and gradients of steps that each accumulate the named modes of every batch and move the weights in
    place."""
    losses, gradients = [], []
    parameters = [p for p in model.parameters() if p.requires_grad]
    for _ in range(STEPS):
        model.zero_grad()
        for batch in batches:
            for mode in names:
                loss = model(mode, batch)
                loss.backward()
                losses.append(loss.item())
        gradients.append([p.grad.clone() for p in parameters])
        with torch.no_grad():
            for p in parameters:
                p.sub_(0.05 * p.grad)
    return losses, gradients


@pytest.mark.gpu
@pytest.mark.parametrize("names", [MODES, ("generation",)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_graphs_change_nothing(model, train, checkpointing, names):  # noqa: F811
    """Catches inputs, weights or boxes of the recording in place of those of the call, gradients that the next replay
    overwrites, shapes that share a recording, and memory of one recording in another."""
    torch.backends.cudnn.allow_tf32 = False
    graphs = importlib.import_module("graphs")
    model.cuda()
    if checkpointing:
        train.checkpoint_activations(model.unet)
    wide = {name: each.cuda() for name, each in make_batch(model, seed=1).items()}
    square = {name: each.cuda() for name, each in make_batch(model, seed=2).items()}
    square |= {name: square[name][..., :16].contiguous() for name in ("noisy_latents", "target")}
    other = {name: each.cuda() for name, each in make_batch(model, seed=3).items()}
    start = {name: each.clone() for name, each in model.state_dict().items()}
    losses, gradients = train_a_little(model, [wide, square, other], names)

    model.load_state_dict(start)
    model.graphs = graphs.UNetGraphs(model.unet, model.adapter)
    recorded_losses, recorded_gradients = train_a_little(model, [wide, square, other], names)
    assert len(model.graphs.recordings) == len(names) * 2
    assert recorded_losses == pytest.approx(losses, rel=1e-4)
    for step, (ours, theirs) in enumerate(zip(recorded_gradients, gradients, strict=True)):
        for one, two in zip(ours, theirs, strict=True):
            assert (one - two).norm() <= 1e-3 * two.norm() + 1e-6, step
