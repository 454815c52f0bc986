"""The tiny Qwen-Image-Edit's VAE, wired by hand: an encoder that is linear, a decoder that only enlarges at its end.

The encoder averages 8 x 8 pixels and moves squares of these into channels, reduced to their principal components. What
is between the decoder's latents and its last levels is left to training.
"""

import itertools
from typing import NamedTuple

import torch
from diffusers import AutoencoderKLQwenImage
from torch import Tensor
from torch.nn.functional import pad

LATENT_NOISE = 0.1  # of a latent's std: what the decoder learns to bear
LOUD = 1000.0  # a constant channel that drowns the others: behind it the last RMS norm only scales
OFFSET = 10.0  # SiLU leaves x + 10 as it is
POOLED_LEVELS = 3  # halvings that only average: the encoder and the decoder work on an eighth of the picture
BLOCK_PARTS = 20  # of the 48 numbers of a 4 x 4 block of that, the encoder keeps these


class Linear(NamedTuple):
    """y = axes @ (x - mean), by place."""

    mean: Tensor  # (D,)
    axes: Tensor  # (n, D)

    def __call__(self, x: Tensor) -> Tensor:
        """(N, D, H, W) -> (N, n, H, W)"""
        return torch.einsum("nd,bdhw->bnhw", self.axes, x - self.mean[:, None, None])


@torch.no_grad()
def wire_vae(vae: AutoencoderKLQwenImage, small: Tensor) -> tuple[Linear, Linear]:
    """Wires the encoder and the decoder's last levels, and sets the latents' mean and std.

    Args:
        small: (N, 3, H, W) in [-1, 1], pictures an eighth as large as the encoder's.

    Returns:
        The encoder's two products; latents_of computes with them what the encoder does.
    """
    z = vae.config.z_dim
    wire(vae.quant_conv, torch.eye(2 * z))
    wire(vae.post_quant_conv, torch.eye(z))
    seen = squares_to_channels(squares_to_channels(small))
    mean, axes, _ = principal_components(seen, BLOCK_PARTS)
    first = Linear(mean, axes)
    mean, axes, stds = principal_components(squares_to_channels(first(seen)), z)
    second = Linear(mean, axes)
    wire_halvings(vae.encoder, first)
    wire_encoders_end(vae.encoder, second, stds)
    wire_decoders_end(vae.decoder)
    vae.register_to_config(latents_mean=[0.0] * z, latents_std=(stds * stds[0] / 4).sqrt().tolist())
    return first, second


def latents_of(wiring: tuple[Linear, Linear], small: Tensor) -> Tensor:
    """(N, 3, H, W) as wire_vae takes them to latents (N, z, H/8, W/8): what the wired encoder computes, in two
    products."""
    first, second = wiring
    return second(squares_to_channels(first(squares_to_channels(squares_to_channels(small)))))


def decode_small(vae: AutoencoderKLQwenImage, latents: Tensor) -> Tensor:
    """Latents (N, z, 1, h, w) -> pictures (N, 3, 1, 8h, 8w): the part of the decoder that is trained. The rest, wired
    by hand, enlarges them eight times."""
    decoder = vae.decoder
    x = decoder.mid_block(decoder.conv_in(latents))
    for block in decoder.up_blocks[: -POOLED_LEVELS - 1]:
        x = block(x)
    for block in decoder.up_blocks[-POOLED_LEVELS - 1].resnets:
        x = block(x)
    return x[:, :3]


def trained_parameters(vae: AutoencoderKLQwenImage) -> list[torch.nn.Parameter]:
    """Those that decode_small works with."""
    decoder = vae.decoder
    modules = [decoder.conv_in, decoder.mid_block, *decoder.up_blocks[: -POOLED_LEVELS - 1]]
    modules += [decoder.up_blocks[-POOLED_LEVELS - 1].resnets]
    return [weight for module in modules for weight in module.parameters()]


# ---- the parts ----


def wire_halvings(encoder: torch.nn.Module, first: Linear) -> None:
    """All levels but the last: averages, then squares into channels, with `first` before the last halving."""
    wire(encoder.conv_in, torch.eye(3))
    blocks, halvings, n = encoder.down_blocks[::2], encoder.down_blocks[1::2], 3
    for level, (block, halving) in enumerate(zip(blocks, halvings, strict=False)):
        if level < len(halvings) - 1:
            wire_block(block, torch.eye(n))
        else:
            wire_block(block, first.axes, -first.axes @ first.mean)
            n = BLOCK_PARTS
        conv = halving.resample[1]
        silence(conv)
        if level < POOLED_LEVELS:
            conv.weight[:n, :n, :2, :2] = torch.eye(n)[:, :, None, None] / 4
        else:
            for part, (row, column) in enumerate(itertools.product(range(2), repeat=2)):
                conv.weight[part * n : (part + 1) * n, :n, row, column] = torch.eye(n)
            n *= 4


def wire_encoders_end(encoder: torch.nn.Module, second: Linear, stds: Tensor) -> None:
    """The last level with `second`, past the last norm and SiLU; stds (z,) of the latents give the posterior's
    variance."""
    z = len(stds)
    axes = torch.cat([second.axes, -second.axes])  # behind SiLU, silu(x) - silu(-x) = x
    bias = torch.cat([-axes @ second.mean, torch.tensor([LOUD])])
    wire_block(encoder.down_blocks[-1], pad(axes, (0, 0, 0, 1)), bias)
    for block in encoder.mid_block.resnets:
        wire_block(block, torch.eye(2 * z + 1))
    silence(encoder.mid_block.attentions[0].to_qkv, encoder.mid_block.attentions[0].proj)
    encoder.norm_out.gamma.fill_(LOUD / encoder.norm_out.scale)
    log_variance = torch.cat([torch.zeros(z), 2 * (LATENT_NOISE * stds).log()])
    wire(encoder.conv_out, pad(torch.cat([torch.eye(z), -torch.eye(z)], dim=1), (0, 0, 0, z)), log_variance)


def wire_decoders_end(decoder: torch.nn.Module) -> None:
    """The last POOLED_LEVELS levels hand three channels on, twice as large each time."""
    for level in range(len(decoder.up_blocks) - POOLED_LEVELS, len(decoder.up_blocks)):
        for block in decoder.up_blocks[level].resnets:
            wire_block(block, torch.eye(3))
        wire(decoder.up_blocks[level - 1].upsamplers[0].resample[1], torch.eye(3))
    last = decoder.up_blocks[-2].upsamplers[0].resample[1]
    wire(last, pad(torch.eye(3), (0, 0, 0, 1)), torch.tensor([OFFSET, OFFSET, OFFSET, LOUD]))
    decoder.norm_out.gamma.fill_(LOUD / decoder.norm_out.scale)
    wire(decoder.conv_out, torch.eye(3), -OFFSET)


def wire(conv: torch.nn.Conv2d | torch.nn.Conv3d, weights: Tensor, bias: Tensor | float = 0.0) -> None:
    """A convolution that maps each place by itself: `weights` (out, in) in the middle of its kernel; the channels that
    they do not reach are zero."""
    silence(conv)
    middle = conv.kernel_size[-1] // 2
    place = (-1, middle, middle) if conv.weight.ndim == 5 else (middle, middle)
    conv.weight.data[(slice(weights.shape[0]), slice(weights.shape[1]), *place)] = weights
    conv.bias.data[: weights.shape[0]] = bias


def wire_block(block: torch.nn.Module, weights: Tensor, bias: Tensor | float = 0.0) -> None:
    """A residual block without its branch: its shortcut alone, or the identity where there is none."""
    silence(block.conv1, block.conv2)
    if isinstance(block.conv_shortcut, torch.nn.Conv3d):
        wire(block.conv_shortcut, weights, bias)


def silence(*convs: torch.nn.Conv2d | torch.nn.Conv3d) -> None:
    """Convolutions that give zeros."""
    for conv in convs:
        conv.weight.data.zero_()
        conv.bias.data.zero_()


def squares_to_channels(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, 4C, H/2, W/2), the place in the square first: what a wired halving does."""
    return torch.cat([x[:, :, row::2, column::2] for row in range(2) for column in range(2)], dim=1)


def principal_components(x: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """(mean (D,), axes (n, D), std along each (n,)) of the places of x (N, D, H, W), largest first."""
    rows = x.transpose(0, 1).flatten(1).T  # (N * H * W, D)
    mean = rows.mean(0)
    values, vectors = torch.linalg.eigh((rows - mean).double().T.cov())
    return mean, vectors.T.flip(0)[:n].float(), values.flip(0)[:n].sqrt().float()
