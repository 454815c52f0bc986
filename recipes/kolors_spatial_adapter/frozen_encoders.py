"""The frozen VAE and text encoder: rows become tensors before training, and validation decodes pictures."""

from collections.abc import Hashable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from adapter import embed_phrases
from boxes import flip_boxes, show_boxes
from diffusers import AutoencoderKL, KolorsPipeline
from diffusers.pipelines.kolors import ChatGLMModel, ChatGLMTokenizer
from layouts import draws, objects_in_bucket
from modes import PROMPT_TOKENS
from PIL import ImageOps
from torch import Tensor

from common.data.encoding import read_pixels
from common.data.loader import Data
from common.data.order import Place
from common.processes import Run
from common.start import dry_run


class Encoders:
    """The frozen VAE and text encoder, used before training and then dropped."""

    def __init__(self, cfg: Any, folder: Path, device: torch.device, dtype: torch.dtype):
        self.cfg, self.device = cfg, device
        text_encoder = ChatGLMModel.from_pretrained(
            folder / "text_encoder", dtype=dtype, variant=variant(folder / "text_encoder")
        )
        self.pipeline = KolorsPipeline(
            vae=load_vae(folder, device, torch.float32),
            text_encoder=text_encoder.to(device).eval(),
            tokenizer=ChatGLMTokenizer.from_pretrained(folder / "tokenizer"),
            unet=None,
            scheduler=None,
        )

    def shape(self, item: tuple) -> tuple[Hashable, int]:
        """Of ("row", record, (width, height)), ("prompt", text) or ("phrase", text): what a batch has in common, the
        text's length."""
        kind, row, *bucket = item
        return (kind, *bucket), len(row.text if bucket else row)

    def read(self, item: tuple) -> dict[str, Tensor]:
        """pixels (3, H, W) in [-1, 1] of a row."""
        _, row, *bucket = item
        return {"pixels": read_pixels(row, self.cfg.data.train_data_dir, *bucket)} if bucket else {}

    @torch.no_grad()
    def encode(self, items: list[tuple], read: dict[str, Tensor]) -> dict[str, Sequence[Tensor]]:
        """prompt_embeds (B, L, D), pooled_prompt_embeds (B, D) and latents (B, 4, H/8, W/8) of pixels (B, 3, H, W); of
        phrases phrase_embed, B times (D,)."""
        texts = [row.text if bucket else row for _, row, *bucket in items]
        if items[0][0] == "phrase":
            return {"phrase_embed": embed_phrases(self.pipeline.tokenizer, self.pipeline.text_encoder, texts)}
        return self.prompts(texts) | (self.images(read["pixels"], self.cfg.random_flip) if read else {})

    @torch.no_grad()
    def prompts(self, texts: list[str]) -> dict[str, Tensor]:
        """prompt_embeds (B, L, D) and pooled_prompt_embeds (B, D) as the pipeline encodes them."""
        prompt_embeds, _, pooled_prompt_embeds, _ = self.pipeline.encode_prompt(
            texts, self.device, do_classifier_free_guidance=False, max_sequence_length=PROMPT_TOKENS
        )
        return {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled_prompt_embeds}

    @torch.no_grad()
    def images(self, pixels: Tensor, flipped: bool) -> dict[str, Tensor]:
        """pixels (B, 3, H, W) in [-1, 1] -> latents (B, 4, H/8, W/8), the posterior's mode, scaled; with flipped also
        those of the mirrored pictures, which are not the mirrored latents."""
        vae = self.pipeline.vae
        views = {"latents": pixels} | ({"latents_flipped": pixels.flip(-1)} if flipped else {})
        return {
            name: vae.encode(view.to(self.device)).latent_dist.mode() * vae.config.scaling_factor
            for name, view in views.items()
        }


def variant(folder: Path) -> str | None:
    """ "fp16" where a model folder has weights of that name alone, as hub repositories of Kolors may."""
    files = [file.name for file in folder.glob("*.safetensors")]
    return "fp16" if files and all(".fp16" in name for name in files) else None


def load_vae(folder: Path, device: torch.device, dtype: torch.dtype) -> AutoencoderKL:
    vae = AutoencoderKL.from_pretrained(folder / "vae", dtype=dtype, variant=variant(folder / "vae"))
    return vae.to(device).eval().requires_grad_(False)


def sample_to_look_at(run: Run, cfg: Any, data: Data, folder: Path, place: Place) -> dry_run.Sample:
    """For a dry run: a row with its boxes, cut to its bucket and mirrored as the step at `place` mirrors it."""
    tokenizer = ChatGLMTokenizer.from_pretrained(folder / "tokenizer")
    encode = dry_run.reading(KolorsPipeline, tokenizer=tokenizer).encode_prompt
    more = {"do_classifier_free_guidance": False, "max_sequence_length": PROMPT_TOKENS}
    sample = dry_run.sample_of_row(run, cfg, data, partial(dry_run.prompt_seen, tokenizer, encode, **more), place)
    record, bucket = run.first_rows[place.sample], data.bucket_ids[place.sample]
    objects = objects_in_bucket(record, bucket, min(cfg.max_objects, cfg.slots()))
    caption, image = sample.pictures.popitem()
    if cfg.random_flip and draws(cfg.run.seed, place.step, [place.position])[1][3] < 0.5:
        boxes = flip_boxes(torch.tensor([item["bbox"] for item in objects]).view(-1, 4)).tolist()
        objects = [{**item, "bbox": box} for item, box in zip(objects, boxes, strict=True)]
        caption, image = f"{caption}, mirrored in this step", ImageOps.mirror(image)
    lost = len(record.extra["objects"]) - len(objects)
    sample.pictures[f"{caption}; {len(objects)} boxes, {lost} cut away"] = show_boxes(image, objects)
    return sample
