"""Which of the model's own parameters train: everything, or what patterns name, some at half the learning rate."""

from collections.abc import Sequence

from from_videox_fun import LOW
from torch import nn


def train_matching(transformer: nn.Module, patterns: Sequence[str], low: Sequence[str] = ()) -> str:
    """Only parameters whose names contain one of the patterns train ("." is in every name), or one of `low`. Says what
    matched; ValueError when a pattern matches nothing."""
    names = [name for name, _ in transformer.named_parameters()]
    for pattern in (*patterns, *low):
        if not any(pattern in name for name in names):
            examples = ", ".join(
                sorted({name.split(".")[2] for name in names if name.startswith("transformer_blocks.")})
            )
            raise ValueError(
                f"trainable_modules: no parameter's name contains {pattern!r}; expected parts of names such as "
                f'{names[0]!r} or, of the blocks, {examples}; "." is everything'
            )
    for name, parameter in transformer.named_parameters():
        parameter.requires_grad_(any(pattern in name for pattern in (*patterns, *low)))
    trained = [p.numel() for p in transformer.parameters() if p.requires_grad]
    share = sum(trained) / sum(p.numel() for p in transformer.parameters())
    said = f"trains {sum(trained) / 1e6:.6g}M parameters ({share:.1%}), {len(trained)} of {len(names)} tensors"
    groups = rate_groups(transformer, patterns, low)
    return said + (f", {len(groups[-1]['params'])} of them at half the learning rate" if groups else "")


def rate_groups(transformer: nn.Module, patterns: Sequence[str], low: Sequence[str]) -> list[dict] | None:
    """Groups for the optimizer where something trains at a part of the learning rate: what `patterns` do not name."""
    groups = [{"params": []}, {"params": [], "lr_scale": LOW}]
    for name, parameter in transformer.named_parameters():
        if parameter.requires_grad:
            groups[not any(pattern in name for pattern in patterns)]["params"].append(parameter)
    return [group for group in groups if group["params"]] if low and groups[1]["params"] else None
