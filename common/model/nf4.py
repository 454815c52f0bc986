"""Linear layers of a frozen base in 4 bits: bitsandbytes' NF4 with double quantisation, half a byte a parameter.

Imported only where it is asked for. Weights are quantised one by one where loading.py fills them in.
"""

import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn

from common.model.streaming import repeated_blocks


class Nf4Linear(Linear4bit):
    """Gives out the dtype that it computes in. bitsandbytes gives back the input's, which under autocast is float32
    behind a norm: activations of twice the size, all the way to the next product."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features) in compute_dtype."""
        return super().forward(x.to(self.compute_dtype))


def quantize_blocks(model: nn.Module, compute_dtype: torch.dtype) -> None:
    """Put 4-bit layers in the place of the linear ones of a model's repeated blocks, before it has weights."""
    owners = [owner for block in repeated_blocks(model) for owner in block.modules()]
    for owner in owners:
        for name, layer in list(owner.named_children()):
            if type(layer) is nn.Linear:
                sizes = layer.in_features, layer.out_features, layer.bias is not None
                quantized = Nf4Linear(*sizes, compute_dtype=compute_dtype, quant_type="nf4", device="meta")
                # bitsandbytes' path for inference on CPUs repacks weights in place and has no backward: training
                # after a validation would go wrong without a word
                quantized.support_avx512bf16_for_cpu = False
                setattr(owner, name, quantized)
