"""The settings that recipes of image models share: which pictures, how sigma is drawn, what validation draws.

Recipes find them in settings.py, beside the others.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from common.rules import between, multiple_of, short, within


@dataclass
class Pictures:
    """How rows of pictures with captions are read, and what is kept of them."""

    image_column: str | None = None
    """column of the pictures; file_path, file_name or image when not given"""
    text_column: str | None = None
    """column of the captions; text, caption or prompt when not given"""
    cache_dir: str | None = None
    """where encoded latents and prompts are kept, also for several runs; <output_dir>/embedding_cache if not given"""
    more_resolutions: tuple[int, ...] = ()
    """resolutions beside the run's, 512 768 for example: each picture is trained at these too, as further samples"""
    encode_batch_size: int = 0
    """rows of one size that the encoders see at once, fewer where the GPU has no room; 0 is 4 on a GPU, 1 on a CPU"""
    caption_dropout: float = 0.1
    """share of samples trained with the encoded empty caption, for classifier-free guidance"""

    def check(self) -> None:
        within(self, 0, 1, "caption_dropout")
        between(self, 0, 4096, "encode_batch_size")
        if wrong := [side for side in self.more_resolutions if not 16 <= side <= 8192 or side % 16]:
            raise ValueError(f"more_resolutions must be multiples of 16, at most 8192, got {short(wrong[0])}")


@dataclass
class Buckets:
    """Sizes of pictures."""

    resolution: int = 1024
    """target area is resolution squared, in aspect-ratio buckets"""
    bucket_multiple: int = 16
    """buckets' sides are multiples of this many pixels; the model needs 16"""

    def check(self) -> None:
        if self.bucket_multiple < 16 or self.bucket_multiple % 16:
            raise ValueError(f"bucket_multiple must be a multiple of 16, got {self.bucket_multiple}; use 16 or 32")
        multiple_of(self, "resolution", self.bucket_multiple, "bucket_multiple")
        between(self, 16, 8192, "resolution")


@dataclass
class FlowMatching:
    """How sigma is drawn, and what an error at it counts."""

    timestep_sampling: Literal["uniform", "logit_normal", "mode"] = "logit_normal"
    """how sigma is drawn, before the shift"""
    logit_mean: float = 0.0
    """mean of logit_normal"""
    logit_std: float = 1.0
    """standard deviation of logit_normal"""
    mode_scale: float = 1.29
    """scale of mode sampling"""
    timestep_shift: float = 0.0
    """fixed shift of sigma towards noise; 0 takes the checkpoint's, which grows with resolution"""
    loss_weighting: Literal["none", "sigma_sqrt", "cosmap"] = "none"
    """weight of the squared error by sigma"""
    mask_column: str | None = None
    """column of a grey picture of the picture's size: its black counts nothing in the loss, its white all, seen at the
    latents' resolution"""
    cache_moments: bool = False
    """draw latents from the VAE's posterior at every step instead of taking its mode"""
    signed: ClassVar[tuple[str, ...]] = ("logit_mean", "mode_scale")

    @property
    def mask_columns(self) -> tuple[str, ...]:
        return (self.mask_column,) if self.mask_column else ()


@dataclass
class Drawing:
    """What validation of an image model measures and draws."""

    num_validation_samples: int = 8
    """rows held out of training for the validation loss (at most a tenth of the data)"""
    num_inference_steps: int = 30
    """sampling steps of validation pictures"""
    guidance_scale: float = 4.0
    """classifier-free guidance of validation pictures"""

    def check(self) -> None:
        between(self, 2, 1000, "num_inference_steps")


@dataclass
class Prompts:
    """What validation draws."""

    validation_prompts: tuple[str, ...] = ()
    """what to draw, or one .txt, .json or .parquet file of it (column text or prompt); when not given, the data's own
    validation_prompts.txt (of edits validation.json), or four held-out rows"""
