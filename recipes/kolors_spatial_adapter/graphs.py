"""Calls of the frozen UNet as CUDA graphs.

At batch 1 a GPU waits for some ten thousand kernels a step to be launched one by one. A graph launches them all at
once: the first call with new shapes records its kernels, forward and backward, and every later one copies its inputs
to where the recorded kernels read them, and replays. Losses, heads and optimizer stay as they are, and so do DDP and
DeepSpeed, which see ordinary gradients. Every combination of mode and shape is a recording of its own; all share
their memory, which is safe because a forward is followed by its own backward before anything else is replayed.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import torch
from adapter import Layout, SpatialAdapter
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

BATCH_INPUTS = ("noisy_latents", "timesteps", "prompt_embeds", "pooled_prompt_embeds", "add_time_ids")
WARM_UP_CALLS = 3  # libraries choose kernels and workspaces in the first ones; torch.compile compiles


def checkpoint_activations(unet: UNet2DConditionModel) -> None:
    """Gradient checkpointing without saving generators' states, which CUDA graphs cannot read: nothing in the UNet is
    random."""
    unet.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False, preserve_rng_state=False))


class UNetGraphs:
    """Calls function(unet, *settings, batch) with a layout, as SpatialModel.unet_with does, through graphs.

    The adapter's weights may change in place between calls, as optimizers change them, but not move.
    """

    def __init__(self, unet: UNet2DConditionModel, adapter: SpatialAdapter):
        self.unet, self.adapter = unet, adapter
        self.recordings: dict[tuple, Recording] = {}
        # memory is shared only by what was recorded on one stream; the default stream cannot be recorded
        self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        self.weights: list[Tensor] = []
        self.weight_grads = torch.empty(0)  # of all weights in one row; every recording leaves them here

    def __call__(self, layout: Layout | None, function: Callable, *arguments: object) -> Tensor:
        *settings, batch = arguments
        if not self.weights:  # now, not when this was built: DeepSpeed moves the weights in between
            self.weights = list(self.adapter.layers.parameters())
            size = sum(weight.numel() for weight in self.weights)
            self.weight_grads = torch.zeros(size, dtype=self.weights[0].dtype, device=self.weights[0].device)
        inputs = {name: batch[name] for name in BATCH_INPUTS}
        if layout is not None:
            inputs |= {"tokens": layout.tokens, **{f"inside {size}": share for size, share in layout.inside.items()}}
        shapes = tuple((name, each.shape, each.dtype) for name, each in inputs.items())
        key = (function, *settings, torch.is_grad_enabled(), shapes)
        if key not in self.recordings:
            positions = None if layout is None else layout.positions

            def call(inputs: dict[str, Tensor]) -> Tensor:
                self.adapter.layout = None
                if positions is not None:
                    inside = {size: inputs[f"inside {size}"] for size in positions}
                    self.adapter.layout = Layout(inputs["tokens"], positions, inside)
                return function(self.unet, *settings, inputs)

            with new_leaves(self.adapter.layers) as leaves:
                self.recordings[key] = Recording(self, call, inputs, leaves)
        recording = self.recordings[key]
        weights = self.weights if recording.backward_graph else []
        return Replay.apply(recording, *inputs.values(), *weights)


@contextlib.contextmanager
def new_leaves(module: nn.Module) -> Iterator[list[Tensor]]:
    """The module's parameters as new leaves of autograd with the same memory: autograd ties a parameter to the stream
    of its first backward, which a recording on another stream may not wait for."""
    own = dict(module.named_parameters())
    leaves = {name: nn.Parameter(parameter.detach()) for name, parameter in own.items()}

    def put(parameters: dict[str, Tensor]) -> None:
        for name, parameter in parameters.items():
            owner, _, last = name.rpartition(".")
            setattr(module.get_submodule(owner), last, parameter)

    put(leaves)
    try:
        yield list(leaves.values())
    finally:
        put(own)


class Recording:
    """One call, and its backward where there is one, recorded for inputs like these."""

    def __init__(
        self,
        graphs: UNetGraphs,
        call: Callable[[dict[str, Tensor]], Tensor],
        inputs: dict[str, Tensor],
        leaves: list[Tensor],
    ):
        self.graphs = graphs
        self.inputs = {name: each.detach().clone().requires_grad_(each.requires_grad) for name, each in inputs.items()}
        wanted = [each for each in self.inputs.values() if each.requires_grad] + leaves
        graphs.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(graphs.stream):
            for _ in range(WARM_UP_CALLS):
                output = call(self.inputs)
                if output.requires_grad:
                    torch.autograd.grad(output, wanted, torch.zeros_like(output), allow_unused=True)
        torch.cuda.current_stream().wait_stream(graphs.stream)

        # thread_local: what other threads do meanwhile (pinned memory, NCCL's watchdog) is allowed
        recorded = {"pool": graphs.pool, "stream": graphs.stream, "capture_error_mode": "thread_local"}
        self.forward_graph, self.backward_graph = torch.cuda.CUDAGraph(), None
        with torch.cuda.graph(self.forward_graph, **recorded):
            output = call(self.inputs)
        self.output = output.detach()
        if output.requires_grad:
            self.output_grad = torch.zeros_like(output)
            self.backward_graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.backward_graph, **recorded):
                grads = torch.autograd.grad(output, wanted, self.output_grad, allow_unused=True)
                self.input_grads = grads[: -len(leaves)]
                pairs = zip(leaves, grads[-len(leaves) :], strict=True)
                flat = [(torch.zeros_like(weight) if grad is None else grad).flatten() for weight, grad in pairs]
                torch.cat(flat, out=graphs.weight_grads)


class Replay(torch.autograd.Function):
    """A recording's forward and backward, to autograd an operation of inputs and weights."""

    @staticmethod
    def forward(ctx, recording: Recording, *tensors: Tensor) -> Tensor:
        ctx.recording = recording
        for static, given in zip(recording.inputs.values(), tensors, strict=False):
            static.copy_(given)
        recording.forward_graph.replay()
        return recording.output.clone()

    @staticmethod
    def backward(ctx, output_grad: Tensor) -> tuple[Tensor | None, ...]:
        recording, weights = ctx.recording, ctx.recording.graphs.weights
        recording.output_grad.copy_(output_grad)
        recording.backward_graph.replay()
        # copies: autograd keeps what it is given as .grad, and the next replay would write into it
        input_grads = iter(recording.input_grads)
        of_inputs = [next(input_grads).clone() if each.requires_grad else None for each in recording.inputs.values()]
        parts = recording.graphs.weight_grads.clone().split([weight.numel() for weight in weights])
        return None, *of_inputs, *(part.view_as(weight) for part, weight in zip(parts, weights, strict=True))
