"""What can be counted of speed without a clock: graphs, recompilations and calls of the compiled update, on a CPU."""

import pytest
import torch
from test_streaming import inputs, klein, qwenimage

from common.model import streaming
from common.step.optimizers import Adafactor, GradientRelease

MODELS = pytest.mark.parametrize(("make", "kinds"), [(qwenimage, 1), (klein, 2)], ids=["qwenimage", "klein"])


def longer(values: dict, tokens: int) -> dict:
    """A micro-batch whose prompts have so many tokens."""
    values = dict(values, encoder_hidden_states=values["encoder_hidden_states"][:, :1].repeat(1, tokens, 1))
    if "txt_ids" in values:
        values["txt_ids"] = torch.cartesian_prod(*[torch.arange(1)] * 3, torch.arange(tokens)).expand(2, -1, -1)
    return values


@pytest.mark.slow
@MODELS
def test_a_block_is_one_graph_for_all_sizes(make, kinds):
    """Catches a graph break in a block, blocks that are compiled one by one, and a recompilation at every new size."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    model = make(torch.float32)
    model.compile_repeated_blocks(backend=counter, fullgraph=True)
    model.enable_gradient_checkpointing()
    graphs = []
    for step, tokens in enumerate((9, 12, 23, 7)):
        model(**longer(inputs(model, step, torch.device("cpu")), tokens))[0].sum().backward()
        graphs.append(counter.frame_count)
    torch._dynamo.reset()
    assert graphs[0] == kinds, graphs
    assert graphs[1] == graphs[-1] <= 3 * kinds, graphs  # a second size makes sizes variables, once


@MODELS
def test_the_update_is_called_once_a_block(make, kinds):
    """Catches an update that is launched for every parameter of a block."""
    model = make(torch.bfloat16)
    blocks = [list(block.parameters()) for block in streaming.repeated_blocks(model)]
    optimizer = Adafactor(model.parameters(), lr=1e-3)
    calls, update = [], optimizer._update
    optimizer._update = lambda weights, *rest: (calls.append(len(weights)), update(weights, *rest))
    GradientRelease(optimizer, blocks)
    model(**inputs(model, 0, torch.device("cpu")))[0].float().sum().backward()
    used, inside = [p for p in model.parameters() if optimizer.state[p]], {p for block in blocks for p in block}
    outside = [p for p in used if p not in inside]
    assert sum(calls) == len(used) and len(calls) == len(blocks) + len(outside), (calls, len(blocks), len(outside))
