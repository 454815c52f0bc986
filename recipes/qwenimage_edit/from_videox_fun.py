"""VideoX-Fun's commands: second names of its flags, flags with nothing to set here, settings that its scripts alone
name, and its meaning of flags that mean something else here (--videox_fun_meanings)."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from common import image_settings, rules, settings

SECOND_NAMES = {"rank": "lora_rank", "network_alpha": "lora_alpha", "vae_mini_batch": "encode_batch_size"}
SKIPPED = {
    "low_vram": "the encoders have left memory when training begins",
    "allow_tf32": "mixed_precision decides what is computed in",
    "logging_dir": "trackers write into output_dir",
    "enable_text_encoder_in_dataloader": "instructions are encoded once, before training",
    "multi_stream": "pictures are encoded once, before training",
    "tokenizer_max_length": "the pipeline's own limit holds",
    "train_sampling_steps": "sigma is any number between 0 and 1",
    "use_peft_lora": "adapters are always peft's",
    "save_state": "every checkpoint has all that a resume needs",
    "report_model_info": "metrics.jsonl has the gradient norm of every step",
    "use_deepspeed": "the launcher decides",
    "use_fsdp": "the launcher decides",
    "abnormal_norm_clip_start": "every step is clipped to max_grad_norm",
    "initial_grad_norm_ratio": "every step is clipped to max_grad_norm",
}
SCHEMES = {  # weighting_scheme: (timestep_sampling, loss_weighting)
    "none": ("uniform", "none"),
    "logit_normal": ("logit_normal", "none"),
    "mode": ("mode", "none"),
    "sigma_sqrt": ("uniform", "sigma_sqrt"),
    "cosmap": ("uniform", "cosmap"),
}
NOT_GIVEN = (image_settings.FlowMatching.timestep_sampling, image_settings.FlowMatching.loss_weighting)
LOW = 0.5  # of the learning rate, for trainable_modules_low_learning_rate


@dataclass
class Settings:
    """What VideoX-Fun's scripts set by names of their own."""

    videox_fun_meanings: bool = False
    """VideoX-Fun's meaning of random_hw_adapt, uniform_sampling, logit_mean and of no weighting_scheme: see README"""
    weighting_scheme: Literal["sigma_sqrt", "logit_normal", "mode", "cosmap", "none"] | None = None
    """sets timestep_sampling and loss_weighting: logit_normal and mode draw sigma so and weigh nothing, the others
    draw it uniformly; they are left alone when it is not given"""
    use_ema: bool = False
    """the same as --ema_decay 0.9999, unless that is given too"""
    use_8bit_adam: bool = False
    """the same as --optimizer adamw_8bit"""
    trainable_modules_low_learning_rate: tuple[str, ...] = ()
    """like trainable_modules: what trains too, at half the learning rate, where trainable_modules does not name it"""
    target_name: str = ""
    """lora_layers, joined by commas; those when empty"""
    lora_skip_name: str = ""
    """lora_skip_layers, joined by commas"""
    vae_path: str | None = None
    """another VAE: a folder with config.json, or a .safetensors file of weights for the model's own"""
    max_train_samples: int = 0
    """train on the first so many rows; 0 takes all"""
    random_flip: bool = False
    """mirror half of the samples, boxes or sources with them; texts stay, so not for data that says left or right"""
    fix_sample_size: tuple[int, ...] = ()
    """height and width of every target, in place of image_sample_size and random_hw_adapt"""

    def check(self) -> None:
        sides = self.fix_sample_size
        if len(sides) not in (0, 2) or not all(16 <= side <= 8192 for side in sides):
            raise ValueError(f"fix_sample_size is a height and a width from 16 to 8192, got {rules.short(sides)}")


def apply(
    videox_fun: Settings, tuning: settings.FullTuning, lora: settings.Lora, flow: image_settings.FlowMatching
) -> None:
    """Settings that stand for others. ValueError where both are given and differ."""
    lora.lora_layers = _parts(videox_fun.target_name) or lora.lora_layers
    lora.lora_skip_layers = _parts(videox_fun.lora_skip_name) or lora.lora_skip_layers
    if videox_fun.use_8bit_adam:
        if tuning.optimizer not in ("adamw", "adamw_8bit"):
            raise ValueError(
                f"use_8bit_adam means --optimizer adamw_8bit, got --optimizer {tuning.optimizer} too; drop one"
            )
        tuning.optimizer = "adamw_8bit"
    if videox_fun.use_ema and not tuning.ema_decay:
        tuning.ema_decay = 0.9999
    scheme = videox_fun.weighting_scheme or ("none" if videox_fun.videox_fun_meanings else None)
    given = flow.timestep_sampling, flow.loss_weighting
    if scheme and given not in (NOT_GIVEN, SCHEMES[scheme]):
        raise ValueError(
            f"weighting_scheme {scheme} means --timestep_sampling {SCHEMES[scheme][0]} --loss_weighting "
            f"{SCHEMES[scheme][1]}, got {given[0]} and {given[1]} too; drop one"
        )
    if scheme:
        flow.timestep_sampling, flow.loss_weighting = SCHEMES[scheme]


def _parts(joined: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in joined.split(",") if part.strip())


def flow_of(
    videox_fun: Settings, flow: image_settings.FlowMatching, uniform_sampling: bool
) -> image_settings.FlowMatching:
    """What sigma is drawn by. VideoX-Fun's list of timesteps begins with noise, so that its logit_mean has the other
    sign."""
    mean = -flow.logit_mean if videox_fun.videox_fun_meanings else flow.logit_mean
    sampling = "uniform" if uniform_sampling else flow.timestep_sampling
    return dataclasses.replace(flow, logit_mean=mean, timestep_sampling=sampling)


def process_strata(uniform: Tensor, positions: list[int], group_size: int, batch: settings.Batch) -> Tensor:
    """uniform_sampling as there: process r of n draws from [r / n, (r + 1) / n), at every step."""
    processes = group_size // (batch.train_batch_size * batch.gradient_accumulation_steps)
    ranks = [position // batch.train_batch_size % processes for position in positions]
    return (uniform.new_tensor(ranks) + uniform) / processes


def shrinking(image_sample_size: int, seed: int, step: int) -> float:
    """random_hw_adapt as there: 1 nine times of ten, else what an image_sample_size can be divided by."""
    by_size = [(768, 1.25), (768, 1.5), (1024, 2.0), (1536, 2.5), (1536, 3.0)]
    others = [ratio for least, ratio in by_size if image_sample_size >= least]
    rng = np.random.RandomState([seed, step])
    return 1.0 if not others or rng.rand() < 0.9 else float(rng.choice(others))
