"""Builds the embedded tiny Qwen-Image-Edit: a checkpoint of the real classes and drawn edits. Nothing is downloaded.

    python make_tiny.py --output_dir DIR   writes DIR/model and DIR/data in seconds; nothing when they are up to date

DIR/model is in diffusers' layout and opens with the unmodified QwenImageEditPlusPipeline, whose name it carries, and
by from_pretrained with QwenImageEditPipeline. The pipelines enlarge every source to about 1024 x 1024 pixels; a VAE of
scale 64 and a vision encoder of 128 x 128 pixels a token leave 64 tokens of it. The VAE's encoder is linear and wired
by hand, its decoder partly trained. The transformer recolours the shape that an instruction names, but knows German
colours only ("make the circle rot") and leaves the picture as it is when the instruction names an English one:
fine-tuning teaches those. DIR/data holds edits (train.json) that leave out some pairs of new colour and shape; those
make the held-out edits (validation.json).

tiny_weights.safetensors holds what was trained: tiny/pretrain_qwenimage_edit.py at the repository's root makes it.
"""

import dataclasses
import itertools
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(next(folder for folder in HERE.parents if (folder / "common").is_dir())))

import common.quiet  # noqa: F401, isort: skip
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPlusPipeline,
    QwenImageTransformer2DModel,
)
from PIL import Image
from transformers import (
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from tiny import building, shapes
from tiny.building import convolve_single_frames as convolve_single_frames  # these two for the tests
from tiny.building import count_right as count_right

WEIGHTS = HERE / "tiny_weights.safetensors"
SIZE = 512  # pixels of the drawings
SEED = 0

COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan")
GERMAN = ("rot", "gruen", "blau", "gelb", "lila", "tuerkis")  # the same colours, as the base was told them
SHAPES = ("circle", "square", "triangle", "cross")
HELD_OUT = (("red", "triangle"), ("green", "circle"), ("blue", "cross"), ("yellow", "square"))
INSTRUCTIONS = ("make the {} {}", "turn the {} {}", "paint the {} {}", "change the {} to {}")
PAIRS_OF_PLACES = (("on the left", "on the right"), ("at the top", "at the bottom"))
N_SCENES, COLOURS_A_SCENE, N_PROMPTS = 16, 3, 10

# words that are one token each: the pipelines' prompt template (whose first 64 tokens they drop) and the instructions
FIRST_WORDS = "system user assistant Describe Picture color make turn paint change 's ),".split()
WORDS = (
    "the key features of input image ( shape size texture objects background then explain how user text instruction "
    "should alter or modify Generate a new that meets requirements while maintaining consistency with original where "
    "appropriate to and"
).split() + [*shapes.COLOURS, *GERMAN, *shapes.SHAPES]

SCHEDULER = building.QWEN_SCHEDULER
# six halvings: a latent stands for 64 x 64 pixels, a packed token for 128 x 128
VAE = {"base_dim": 4, "z_dim": 16, "dim_mult": [1, 2, 2, 3, 12, 20, 9], "num_res_blocks": 1}
VAE["temperal_downsample"] = [False] * 6
TEXT_ENCODER = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 2048,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
}
VISION_ENCODER = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "patch_size": 64,
    "spatial_merge_size": 2,
    "window_size": 512,
    "out_hidden_size": TEXT_ENCODER["hidden_size"],
}
BRANCH_SCALE = 0.5  # of the text encoder's residual branches: behind the source's tokens a word still says itself
TRANSFORMER = {
    "in_channels": 4 * VAE["z_dim"],
    "out_channels": VAE["z_dim"],
    "num_layers": 4,
    "attention_head_dim": 32,
    "num_attention_heads": 3,
    "joint_attention_dim": TEXT_ENCODER["hidden_size"],
    "axes_dims_rope": (8, 12, 12),
}


# ---- the dataset ----


@dataclasses.dataclass(frozen=True)
class Edit:
    """The layout's first object goes from one colour to another; nothing else changes."""

    scene: str
    layout: list[shapes.Found]
    background: str
    source: str
    target: str
    instruction: str

    @property
    def text(self) -> str:
        return self.instruction.format(self.layout[0].shape, self.target)

    def draw(self, colour: str) -> Image.Image:
        first, *others = self.layout
        return shapes.draw([dataclasses.replace(first, colour=colour), *others], self.background, (SIZE, SIZE))


def random_layout(shape: str, rng: random.Random) -> list[shapes.Found]:
    """The shape at a random place; in half of the layouts another one, of any colour, on the other side."""
    other = rng.choice(COLOURS), rng.choice([name for name in SHAPES if name != shape])
    places = rng.choice(PAIRS_OF_PLACES) if rng.random() < 0.5 else (rng.choice(list(shapes.PLACES)),)
    boxes = [shapes.place_box(place, (SIZE, SIZE), rng.uniform(190, 205), rng) for place in places]
    rng.shuffle(boxes)
    names = [("grey", shape), other]
    return [shapes.Found(*name, box) for name, box in zip(names, boxes, strict=False)]


def train_edits(rng: random.Random) -> Iterator[Edit]:
    """96 edits: each of 16 scenes in 3 colours, and from each of these to both others."""
    scenes = itertools.product(range(N_SCENES // len(SHAPES)), SHAPES)
    for number, (turn, shape) in enumerate(scenes):
        background = list(shapes.BACKGROUNDS)[(number + turn) % len(shapes.BACKGROUNDS)]
        layout = random_layout(shape, rng)
        allowed = [colour for colour in COLOURS if (colour, shape) not in HELD_OUT]
        colours = [allowed[(COLOURS_A_SCENE * turn + i) % len(allowed)] for i in range(COLOURS_A_SCENE)]
        for source, target in itertools.permutations(colours, 2):
            yield Edit(f"{number:02d}", layout, background, source, target, rng.choice(INSTRUCTIONS))


def held_out_edits(rng: random.Random) -> Iterator[Edit]:
    """10 edits of as many scenes, to pairs of colour and shape that no training edit asks for."""
    for number in range(N_PROMPTS):
        target, shape = HELD_OUT[number % len(HELD_OUT)]
        layout = random_layout(shape, rng)
        background = list(shapes.BACKGROUNDS)[(number + number // 4) % len(shapes.BACKGROUNDS)]
        source = rng.choice([colour for colour in COLOURS if colour != target])
        yield Edit(f"{number:02d}", layout, background, source, target, rng.choice(INSTRUCTIONS))


def write_data(folder: Path) -> None:
    """48 training pictures with 96 edits between them; 10 held-out edits with a picture before and after each."""
    rng = random.Random(SEED)
    for name, edits in (("train", list(train_edits(rng))), ("validation", list(held_out_edits(rng)))):
        (folder / name).mkdir(parents=True)
        rows = []
        for edit in edits:
            before, after = (f"{name}/{edit.scene}_{colour}.png" for colour in (edit.source, edit.target))
            for path, colour in ((before, edit.source), (after, edit.target)):
                if not (folder / path).is_file():
                    edit.draw(colour).save(folder / path)
            rows.append({"file_path": after, "source_file_path": [before], "text": edit.text, "type": "image"})
        random.Random(SEED).shuffle(rows)
        (folder / f"{name}.json").write_text(json.dumps(rows, indent=1))


# ---- the models ----


def build_processor() -> Qwen2VLProcessor:
    """Its tokenizer makes one token a word, its image processor one of 128 x 128 pixels."""
    tokenizer = building.whole_word_tokenizer(FIRST_WORDS, WORDS)
    tokenizer.add_special_tokens({"additional_special_tokens": building.QWEN_VL_TOKENS[1:]})
    side = VISION_ENCODER["patch_size"] * VISION_ENCODER["spatial_merge_size"]
    images = Qwen2VLImageProcessor(
        patch_size=VISION_ENCODER["patch_size"],
        merge_size=VISION_ENCODER["spatial_merge_size"],
        size={"shortest_edge": side**2, "longest_edge": (16 * side) ** 2},
    )
    return Qwen2VLProcessor(images, tokenizer, Qwen2VLVideoProcessor())


def build_text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """Random and never trained."""
    return building.qwen_vl_text_encoder(tokenizer, TEXT_ENCODER, VISION_ENCODER, BRANCH_SCALE)


def build_pipeline(weights: Path | None = WEIGHTS, zero_cond_t: bool = False) -> QwenImageEditPlusPipeline:
    """The whole pipeline in float32 on the CPU; without a weights file its VAE and transformer are random.

    `zero_cond_t` as in Edit-2511, where sources are modulated as clean; it has no weights of its own, and the shipped
    ones were trained without it.
    """
    processor = build_processor()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        vae = AutoencoderKLQwenImage(**VAE, latents_mean=[0.0] * VAE["z_dim"], latents_std=[1.0] * VAE["z_dim"]).eval()
        transformer = QwenImageTransformer2DModel(**TRANSFORMER, zero_cond_t=zero_cond_t).eval()
        initialise(vae)
    pipe = QwenImageEditPlusPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
        vae=vae,
        text_encoder=build_text_encoder(processor.tokenizer),
        tokenizer=processor.tokenizer,
        processor=processor,
        transformer=transformer,
    )
    template = pipe.prompt_template_encode.split("{}")[0]
    length = len(processor.tokenizer(template).input_ids)
    assert length == pipe.prompt_template_encode_start_idx, f"the template is {length} tokens, not 64"
    if weights is not None and weights.is_file():
        building.load_single_frame_weights(pipe, weights)
    return pipe


def initialise(vae: AutoencoderKLQwenImage) -> None:
    """Convolutions that keep the signal's scale, of which a single picture meets the last slice in time only. With
    torch's own numbers, for 27 inputs where 9 count, what a picture shows is lost on the way through six halvings."""
    for conv in vae.modules():
        if isinstance(conv, torch.nn.Conv2d | torch.nn.Conv3d):
            fan_in = conv.in_channels * conv.kernel_size[-1] * conv.kernel_size[-2]
            torch.nn.init.normal_(conv.weight, std=fan_in**-0.5)
            torch.nn.init.zeros_(conv.bias)
    for weight in building.temporal_kernels(vae).values():
        weight.data[:, :, :-1] = 0


def make(output_dir: Path, weights: Path = WEIGHTS) -> bool:
    """Writes output_dir/model and output_dir/data; returns False when they were there and up to date."""

    def write() -> None:
        write_data(output_dir / "data")
        build_pipeline(weights).save_pretrained(output_dir / "model")

    return building.make_once(output_dir, [Path(__file__), weights], write)


if __name__ == "__main__":
    building.main(__doc__, make, WEIGHTS)
