"""What one micro-batch takes of a GPU, traced on a model without memory: every tensor of its forward and backward is
made on the meta device, and their sizes are added up while they live.

Repeated blocks are traced once a shape and stand for themselves from then on. Compiled ones are traced as
torch.compile partitions them: what its min-cut keeps for backward, and in between only what no kernel can fuse away.
"""

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.flop_counter import flop_registry

from common.start.fused import Traced, of_graph, results_of, size_of, storage_of


class Tracker(TorchDispatchMode):
    """Adds up the storages that operations on the meta device make, from their birth to their end."""

    def __init__(self, known: Iterable[Tensor] = ()):
        super().__init__()
        self.traced, self.live = Traced(), 0
        self.sizes: dict[int, int] = {}
        self.known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        new = [self._born(each) for each in tensors_in(result) if each.device.type == "meta"]
        self.traced.kernels += any(new) or function._schema.name.endswith("_")
        if function._overloadpacket in flop_registry:
            flops = flop_registry[function._overloadpacket]
            self.traced.flops += flops(*args, **(kwargs or {}), out_val=result)
        return result

    def _born(self, tensor: Tensor) -> bool:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.sizes or key in self.known:
            return False
        self.sizes[key] = storage.nbytes()
        weakref.finalize(storage, self._ended, key)
        self.live += self.sizes[key]
        self.traced.peak = max(self.traced.peak, self.live)
        return True

    def _ended(self, key: int) -> None:
        self.live -= self.sizes.pop(key)

    def ends_now(self, tensor: Tensor) -> None:
        """Count a tensor no more, although something refers to it."""
        key = tensor.untyped_storage()._cdata
        self.live -= self.sizes.get(key, 0)
        self.sizes[key] = 0


def tensors_in(values: Any) -> list[Tensor]:
    return [each for each in tree_flatten(values)[0] if isinstance(each, Tensor)]


def bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def trace(
    model: nn.Module, losses_of: Callable[[nn.Module], Iterable[Tensor]], dtype: torch.dtype, compiled: bool
) -> Traced:
    """A forward and a backward for each of the losses of a model without memory, whose floats are of `dtype`.

    Gradients of weights count until they are complete: then they may be kept in shards, or be used up.
    """
    model = nn.Module.to(unquantized_copy(model), dtype).train()
    names = getattr(model, "_repeated_blocks", None) or getattr(model, "_no_split_modules", None) or ()
    costs: dict[tuple, Cost] = {}
    for module in model.modules():
        if type(module).__name__ in names:
            module.forward = Stand(module, costs, compiled)
    tracker = Tracker([*model.parameters(), *model.buffers()])
    with (
        mock.patch("torch.nn.functional.scaled_dot_product_attention", fused_attention),
        mock.patch("torch.autocast", lambda *settings, **more: contextlib.nullcontext()),
    ):
        for loss in losses_of(model):  # every block's cost, outside of the count
            del loss
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(forget_gradient)
        for cost in costs.values():
            cost.tracker, cost.forwards = tracker, 0
        with tracker:
            for loss in losses_of(model):
                tracker.traced.kept = max(tracker.traced.kept, tracker.live)
                loss.backward()
                del loss
    for cost in costs.values():
        tracker.traced.flops += cost.forwards * cost.forward.flops + cost.backwards * cost.backward.flops
        tracker.traced.kernels += cost.forwards * cost.forward.kernels + cost.backwards * cost.backward.kernels
    return tracker.traced


def unquantized_copy(model: nn.Module) -> nn.Module:
    """A copy with ordinary linear layers in the place of those in 4 bits: what they keep for backward is equal."""
    quantized = [p for p in model.parameters() if hasattr(p, "quant_state")]
    ordinary = {id(p): nn.Parameter(torch.empty(p.shape, device="meta"), requires_grad=False) for p in quantized}
    linear = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    names = [name for name, module in linear if id(module.weight) in ordinary]
    result = copy.deepcopy(model, ordinary)
    for name in names:
        result.get_submodule(name).__class__ = nn.Linear
    return result


def forget_gradient(parameter: nn.Parameter) -> None:
    parameter.grad = None


def fused_attention(query: Tensor, key: Tensor, value: Tensor, *unused: Any, **settings: Any) -> Tensor:
    """Attention that keeps its inputs, its output and a number for each query, as all fused kernels do."""
    if query.shape[-1] == value.shape[-1]:
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]
    return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, None, compute_log_sumexp=True)[0]


# ---------------------------------------------------------------- a block that stands for all of its shape


@dataclass
class Cost:
    """Of one block's call."""

    forward: Traced
    """kept: what it saves beside its inputs; peak: beside that and its outputs"""
    backward: Traced
    """peak: with what was saved, as long as that is needed, and the gradients that it gives"""
    outputs: list[Tensor]
    spec: Any
    """how the outputs are nested"""
    tracker: "Tracker | None" = None
    """whose time it is now"""
    forwards: int = 0
    backwards: int = 0


class Stand:
    """A block's forward that makes tensors of its sizes and computes nothing."""

    def __init__(self, block: nn.Module, costs: dict[tuple, Cost], compiled: bool):
        self.block, self.costs, self.compiled = block, costs, compiled
        self.inner = type(block).forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inputs = tensors_in((args, kwargs))
        grad = torch.is_grad_enabled()
        key = (type(self.block), grad, *((each.shape, each.dtype, each.requires_grad and grad) for each in inputs))
        parameters = list(self.block.parameters())
        if key not in self.costs:
            self.costs[key] = self._cost(args, kwargs)
        cost = self.costs[key]
        return tree_unflatten(list(StandIn.apply(cost, len(inputs), *inputs, *parameters)), cost.spec)

    def _cost(self, args: tuple, kwargs: dict) -> Cost:
        grad = torch.is_grad_enabled()

        def leaf(each: Any) -> Any:
            return each.detach().requires_grad_(each.requires_grad and grad) if isinstance(each, Tensor) else each

        args, kwargs = tree_map(leaf, (args, kwargs))
        block = copy.deepcopy(self.block)
        block.forward = self.inner.__get__(block)
        cost = compiled_cost if self.compiled and grad else eager_cost
        with torch.autograd.graph.saved_tensors_hooks(lambda each: each, lambda each: each):  # not checkpointing's
            return cost(block, args, kwargs)


class StandIn(torch.autograd.Function):
    """A call of a Stand, to autograd an operation of inputs and weights."""

    @staticmethod
    def forward(ctx, cost: Cost, n_inputs: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        cost.forwards += 1
        ctx.cost = cost
        outputs = tuple(torch.empty_like(like) for like in cost.outputs)
        saved = torch.empty(cost.forward.kept, dtype=torch.uint8, device="meta")
        torch.empty(cost.forward.peak, dtype=torch.uint8, device="meta")
        ctx.save_for_backward(saved, *tensors)
        return outputs

    @staticmethod
    def backward(ctx, *output_grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.cost.backwards += 1
        saved, *tensors = ctx.saved_tensors
        ctx.cost.tracker.ends_now(saved)  # it is used up bit by bit, which the backward's peak knows
        wanted = ctx.needs_input_grad[2:]
        grads = [torch.empty_like(each) if wants else None for each, wants in zip(tensors, wanted, strict=True)]
        there = bytes_of(each for each in grads if each is not None)
        torch.empty(max(0, ctx.cost.backward.peak - there), dtype=torch.uint8, device="meta")
        return None, None, *grads


def eager_cost(block: nn.Module, args: tuple, kwargs: dict) -> Cost:
    """Of a block whose operations run one after the other."""
    given = tensors_in((args, kwargs))
    with Tracker([*block.parameters(), *block.buffers(), *given]) as tracker:
        flat, spec = tree_flatten(block(*args, **kwargs))
        forward, tracker.traced = tracker.traced, Traced()
        forward.kept, forward.peak = tracker.live - bytes_of(flat), forward.peak - tracker.live
        ends = [each for each in flat if each.requires_grad]
        wanted = [each for each in (*given, *block.parameters()) if each.requires_grad]
        if ends:
            torch.autograd.grad(ends, wanted, list(map(torch.empty_like, ends)), allow_unused=True)
            tracker.traced.peak -= bytes_of(flat) + bytes_of(ends)
    return Cost(forward, tracker.traced, [each.detach() for each in flat], spec)


def compiled_cost(block: nn.Module, args: tuple, kwargs: dict) -> Cost:
    """Of a block as torch.compile partitions it into a forward and a backward."""
    from functorch.compile import aot_module, make_boxed_func, min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: Sequence) -> Callable:
        graphs.append(graph)
        return make_boxed_func(graph)

    partition, decompositions = min_cut_rematerialization_partition, select_decomp_table()
    call = aot_module(block, keep, keep, partition_fn=partition, decompositions=decompositions)
    flat, spec = tree_flatten(call(*args, **kwargs))
    ends = [each for each in flat if each.requires_grad]
    torch.autograd.backward(ends, list(map(torch.empty_like, ends)))
    forward, backward = graphs
    foreign = {storage_of(node) for node in forward.graph.nodes if node.op == "placeholder"} | {None}
    results = [node for node in results_of(forward) if storage_of(node) not in foreign]
    saved = [node for node in results_of(forward)[len(flat) :] if node in results]
    of_forward, of_backward = of_graph(forward, set()), of_graph(backward, {node.name for node in saved})
    of_forward.kept = sum({storage_of(node): size_of(node) for node in saved}.values())
    there = sum({storage_of(node): size_of(node) for node in results}.values())
    of_forward.peak = max(0, of_forward.peak - there)
    return Cost(of_forward, of_backward, [each.detach() for each in flat], spec)
