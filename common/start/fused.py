"""What a compiled block's graph takes of memory, where pointwise operations and reductions are fused into the kernels
that need their results."""

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import flop_registry

UNFUSED = ("mm", "addmm", "bmm", "baddbmm", "convolution", "attention")  # kernels of libraries


@dataclass
class Traced:
    """Of one micro-batch on one process, in bytes, beside weights and complete gradients."""

    kept: int = 0
    """alive between forward and backward"""
    peak: int = 0
    """at most alive at a time"""
    flops: float = 0.0
    """of matrix products, convolutions and attention, as often as they are computed"""
    kernels: int = 0
    """launched"""


def results_of(graph: torch.fx.GraphModule) -> list[torch.fx.Node]:
    (end,) = (node for node in graph.graph.nodes if node.op == "output")
    return [node for node in end.args[0] if isinstance(node, torch.fx.Node)]


def of_graph(graph: torch.fx.GraphModule, own_inputs: set[str]) -> Traced:
    """peak: at most alive beside inputs, of which own_inputs count until they are read for the last time; pointwise
    operations and reductions are fused into what needs their results."""
    nodes = list(graph.graph.nodes)
    time = {node: index for index, node in enumerate(nodes)}
    written = {node for node in nodes if node.op == "call_function" and is_written(node)}
    read_at: dict[torch.fx.Node, int] = {}
    for node in reversed(nodes):  # a fused operation happens when what it is fused into does
        happens = node in written or node.op == "output"
        read_at[node] = time[node] if happens else max(map(read_at.__getitem__, node.users), default=0)
    foreign = {storage_of(node) for node in nodes if node.op == "placeholder" and node.name not in own_inputs}
    begins: dict[int, int] = {}
    ends: dict[int, int] = {}
    sizes: dict[int, int] = {}
    for node in nodes:
        key = storage_of(node)
        if key is None or key in foreign:
            continue
        if node in written or node.op == "placeholder":
            begins.setdefault(key, time[node])
        sizes[key] = size_of(node)
        ends[key] = max([ends.get(key, 0), *(read_at[user] for user in node.users)])
    changes = [(begin, sizes[key]) for key, begin in begins.items()]
    changes += [(ends[key] + 0.5, -sizes[key]) for key in begins]
    live = list(itertools.accumulate(change for _, change in sorted(changes)))
    flops = sum(flops_of(node) for node in nodes if node.op == "call_function")
    return Traced(peak=max(live, default=0), flops=flops, kernels=len(written))


def is_written(node: torch.fx.Node) -> bool:
    """Whether an operation's result goes to memory: a library's kernel, or what one of them reads, or a result."""
    if is_unfused(node):
        return True
    return any(user.op == "output" or is_unfused(user) for user in node.users)


def is_unfused(node: torch.fx.Node) -> bool:
    name = getattr(getattr(node.target, "_schema", None), "name", "").removeprefix("aten::")
    return any(name == word or (word == "attention" and word in name) for word in UNFUSED)


def storage_of(node: torch.fx.Node) -> int | None:
    value = node.meta.get("val") if isinstance(node, torch.fx.Node) else None
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else None


def size_of(node: torch.fx.Node) -> int:
    return node.meta["val"].untyped_storage().nbytes()


def flops_of(node: torch.fx.Node) -> float:
    packet = getattr(node.target, "_overloadpacket", None)
    if packet not in flop_registry:
        return 0.0

    def value_of(each: Any) -> Any:
        return each.meta["val"] if isinstance(each, torch.fx.Node) else each

    args, kwargs = tree_map(value_of, (node.args, node.kwargs))
    return flop_registry[packet](*args, **kwargs, out_val=node.meta["val"])
