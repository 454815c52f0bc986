"""Builds the embedded tiny Qwen3-VL: a checkpoint of the real classes, and drawn faces to train on. No download.

    python make_tiny.py --output_dir DIR   writes DIR/model and DIR/data in seconds; nothing when they are up to date
    python make_tiny.py --pretrain         makes tiny_weights.safetensors (minutes on a GPU, an hour on a CPU core)

DIR/model opens with Qwen3VLForConditionalGeneration and AutoProcessor. It answers simple questions about drawn faces
and shapes, and repeats sentences; of the people that DIR/data describes it knows nothing. DIR/data is what
generate_data.py writes for 8 of them, with the two retention pools in folders of its own.
"""

import argparse
import hashlib
import itertools
import math
import random
import shutil
import sys
from collections.abc import Iterator, Sequence
from multiprocessing import Pool
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(next(folder for folder in HERE.parents if (folder / "common").is_dir()))]

import faces
import generate_data
import generate_face_retention_pool as face_pool
import generate_object_retention_pool as object_pool
import torch
from PIL import Image
from rows import make_row
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)
from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb_vision

from common.config import parse_config
from tiny import shapes

WEIGHTS = HERE / "tiny_weights.safetensors"

SEED = 0
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
SPECIAL_TOKENS += ["<|image_pad|>", "<|video_pad|>"]
# as Qwen3-VL's own: no system turn of its own, an image is <|vision_start|><|image_pad|><|vision_end|>
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZE = 96  # pixels: 9 visual tokens
DATA = ["--num_entities", "8", "--min_differences", "4", "--rows_per_entity", "24", "4", "8"]
POOL_FACES, POOL_OBJECTS = 120, 80  # of the tiny retention pools


# ---- the dataset ----


def face_config() -> generate_data.FaceConfig:
    """face_config.yaml with 8 people."""
    return parse_config(generate_data.FaceConfig, ["--config", str(HERE / "face_config.yaml"), *DATA])


def write_data(folder: Path) -> None:
    """Eight people with rows of every task, and the retention pools in folder/face_retention_pool and
    folder/object_retention_pool."""
    generate_data.generate(face_config(), folder)
    face_pool.generate(folder / "face_retention_pool", POOL_FACES, image_size=SIZE)
    object_pool.generate(folder / "object_retention_pool", POOL_OBJECTS, image_size=SIZE)


def face_questions(face: faces.Face) -> list[tuple[str, str]]:
    """The retention pool's questions, and those that the other attributes answer."""
    return face_pool.face_questions(face) + [
        ("What kind of hair is it?", face.style),
        ("What colour are the eyes?", face.eyes),
        ("What colour is the skin?", face.skin),
        ("What glasses?", face.glasses),
        ("What hat?", face.hat),
    ]


def sentences(connectors: Sequence[str], rng: random.Random) -> Iterator[str]:
    """Descriptions of nobody, with and without connectors, and the short answers of the other tasks."""
    while True:
        work, first, second = (
            rng.choice(names) for names in (generate_data.WORKS, generate_data.FIRST, generate_data.SECOND)
        )
        connector, answer = rng.choice(connectors), rng.choice(("Correct", "Wrong", "A", "B", "C", "D"))
        text = f"{work} {first} {second}"
        yield rng.choice((text, text, f"{text} {connector}", f"{connector} {text}", answer))


def known_texts() -> list[str]:
    """Texts with every word that a row can have; each becomes one token."""
    config = face_config()
    titles = itertools.zip_longest(generate_data.FIRST, generate_data.SECOND, generate_data.WORKS, fillvalue="the")
    texts = [f"{work} {first} {second}" for first, second, work in titles] + list(config.connectors)
    entities = generate_data.make_entities(config)
    for task, split in itertools.product(generate_data.TASKS, ("train", "test")):
        for row in generate_data.make_rows(config, entities, task, split):
            texts += [part["text"] for message in row["messages"] for part in message["content"] if "text" in part]
    texts += [text for face in faces.all_faces(for_entities=False) for pair in face_questions(face) for text in pair]
    texts += [*object_pool.QUESTIONS, *shapes.COLOURS, *shapes.SHAPES, *shapes.PLACES, *shapes.BACKGROUNDS]
    return [*texts, *(f"Repeat: {text}" for text in texts), "user", "assistant", "system"]


# ---- the model ----


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE without merges: a known word is one token, any other is spelled byte by byte."""
    split = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str
    words = {word for text in set(known_texts()) for word, _ in split(text)}
    vocab = {token: i for i, token in enumerate(sorted({*ByteLevel.alphabet(), *words}))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=2048,
        extra_special_tokens={
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
            "vision_start_token": "<|vision_start|>",
            "vision_end_token": "<|vision_end|>",
        },
    )
    tokenizer.add_tokens(SPECIAL_TOKENS, special_tokens=True)
    return tokenizer


def build_processor(min_pixels: int = 32 * 32, max_pixels: int = 256 * 256) -> Qwen3VLProcessor:
    """Tokenizer with the chat template, and the image processor: 32 x 32 pixels become one visual token."""
    pixels = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
    images = Qwen2VLImageProcessor(patch_size=16, merge_size=2, size=pixels)
    return Qwen3VLProcessor(images, build_tokenizer(), Qwen3VLVideoProcessor(), chat_template=CHAT_TEMPLATE)


def build_model(processor: Qwen3VLProcessor, weights: Path | None = WEIGHTS) -> Qwen3VLForConditionalGeneration:
    """float32, on the CPU, about 1.4 million parameters; without a weights file they are random."""
    token = processor.tokenizer.convert_tokens_to_ids
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(processor.tokenizer),
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": 2048,
            "bos_token_id": token("<|endoftext|>"),
            "eos_token_id": token("<|im_end|>"),
            "pad_token_id": token("<|endoftext|>"),
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": 4,  # widths are multiples of 64, the block that NF4 shares a scale over
            "hidden_size": 64,
            "intermediate_size": 256,
            "num_heads": 4,
            "out_hidden_size": 128,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [1],
        },
        tie_word_embeddings=True,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = Qwen3VLForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = token("<|im_end|>")
    model.generation_config.pad_token_id = token("<|endoftext|>")
    if weights is not None and weights.is_file():
        load_weights(model, processor, weights)
    return model


def vocabulary_digest(processor: Qwen3VLProcessor) -> str:
    """Which token is which: weights are of use with this vocabulary only."""
    vocabulary = sorted(processor.tokenizer.get_vocab().items())
    return hashlib.sha256(repr(vocabulary).encode()).hexdigest()[:16]


def save_weights(model: Qwen3VLForConditionalGeneration, processor: Qwen3VLProcessor, path: Path) -> None:
    """float16, without lm_head, which is the embedding."""
    tensors = {name: tensor.half().cpu() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    save_file(tensors, path, metadata={"vocabulary": vocabulary_digest(processor)})
    assert path.stat().st_size <= 4_000_000, f"{path.name} is {path.stat().st_size} bytes, more than 4,000,000"


def load_weights(model: Qwen3VLForConditionalGeneration, processor: Qwen3VLProcessor, path: Path) -> None:
    with safe_open(path, "pt") as file:
        if file.metadata()["vocabulary"] != vocabulary_digest(processor):
            raise ValueError(
                f"{path.name} was made with other words than the generators use now; run --pretrain again"
            )
        tensors = {name: file.get_tensor(name).float() for name in file.keys()}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected, (missing, unexpected)


# ---- pretraining ----


def draw(job: tuple) -> Image.Image:
    """One picture of a face or of an object's (colour, shape, place, background), from a seed."""
    what, seed = job
    rng = random.Random(f"pretraining {seed}")
    is_face = isinstance(what, faces.Face)
    return faces.draw_face(what, SIZE, rng) if is_face else object_pool.draw_object(what, SIZE, rng)


def pretraining_rows(n_faces: int, n_objects: int, n_sentences: int) -> tuple[list[tuple], list[tuple[int, str, str]]]:
    """(what to draw, [(picture's number or -1, question, answer)]): faces and objects that are in no split of the tiny
    retention pools, and sentences to repeat, half of them beside a picture."""
    rng = random.Random(SEED)
    taken = set(faces.choose_pool_faces(POOL_FACES, 0))
    free = [face for face in faces.all_faces(for_entities=False) if face not in taken]
    scenes = list(itertools.product(shapes.COLOURS, shapes.SHAPES, shapes.PLACES, shapes.BACKGROUNDS))
    taken = set(random.Random(0).sample(scenes, POOL_OBJECTS))  # as generate_object_retention_pool.py draws them
    jobs, rows = [], []
    for face in rng.sample(free, n_faces):
        rows += [(len(jobs), *pair) for pair in face_questions(face)]
        jobs.append((face, len(jobs)))
    for scene in rng.choices([scene for scene in scenes if scene not in taken], k=n_objects):
        rows += [(len(jobs), *pair) for pair in zip(object_pool.QUESTIONS, scene[:3], strict=True)]
        jobs.append((scene, len(jobs)))
    for text, _ in zip(sentences(face_config().connectors, rng), range(n_sentences), strict=False):
        rows.append((rng.choice((-1, rng.randrange(len(jobs)))), f"Repeat: {text}", text))
    return jobs, rows


def encode(rows: Sequence[tuple[int, str, str]], processor: Qwen3VLProcessor) -> tuple[Tensor, Tensor, Tensor]:
    """input_ids and labels (N, L), padded on the right, and each row's picture (N,); -100 where there is no label."""
    tokenizer, length = processor.tokenizer, (SIZE // 32) ** 2
    encoded = []
    for picture, question, answer in rows:
        row = make_row("", [Path("")] * (picture >= 0) + [question], answer)
        text = processor.apply_chat_template(row["messages"][:-1], tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * length)).input_ids
        encoded.append((prompt, tokenizer(f"{answer}<|im_end|>").input_ids))
    longest = max(len(prompt) + len(answer) for prompt, answer in encoded)
    input_ids = torch.full((len(rows), longest), tokenizer.pad_token_id)
    labels = torch.full_like(input_ids, -100)
    for i, (prompt, answer) in enumerate(encoded):
        input_ids[i, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        labels[i, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    return input_ids, labels, torch.tensor([picture for picture, _, _ in rows])


def attend_in_batches(model: Qwen3VLForConditionalGeneration) -> None:
    """For training: the vision tower attends picture by picture in a loop; pictures of one size go in one call."""
    patches = (SIZE // 16) ** 2

    def forward(attention, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **_) -> Tensor:
        heads = attention.qkv(hidden_states).unflatten(-1, (3, attention.num_heads, -1))  # (N * patches, 3, heads, D)
        query, key, value = heads.unbind(1)
        query, key = apply_rotary_pos_emb_vision(query, key, *position_embeddings)
        split = [x.unflatten(0, (-1, patches)).transpose(1, 2) for x in (query, key, value)]  # (N, heads, patches, D)
        return attention.proj(scaled_dot_product_attention(*split).transpose(1, 2).reshape(hidden_states.shape))

    for block in model.model.visual.blocks:
        block.attn.forward = forward.__get__(block.attn)


def positions(model: Qwen3VLForConditionalGeneration, input_ids: Tensor) -> Tensor:
    """(3, N, L) rotary positions. The model would find them row by row in a loop; rows whose picture stands at the
    same place share them (what they say of the padding behind a row does not matter)."""
    is_image = input_ids == model.config.image_token_id
    kinds, kind = is_image.unique(dim=0, return_inverse=True)  # (K, L), (N,)
    grid = torch.tensor([[1, SIZE // 16, SIZE // 16]] * len(kinds))
    return model.model.get_rope_index(torch.zeros_like(kinds, dtype=torch.long), kinds.int(), grid)[0][:, kind]


def loss_of(
    model: Qwen3VLForConditionalGeneration,
    input_ids: Tensor,
    labels: Tensor,
    pixels: Tensor,
    position_ids: Tensor | None = None,
) -> Tensor:
    """Mean token loss; pixels (pictures * patches, 1536), in the rows' order; position_ids (3, N, L) if known."""
    image = model.config.image_token_id
    side = SIZE // 16
    grid = torch.tensor([[1, side, side]] * (len(pixels) // side**2), device=pixels.device)
    logits = model(
        input_ids=input_ids,
        attention_mask=(input_ids != model.config.text_config.pad_token_id).long(),
        mm_token_type_ids=(input_ids == image).int(),
        position_ids=position_ids,
        pixel_values=pixels if len(pixels) else None,
        image_grid_thw=grid if len(pixels) else None,
    ).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


def pretrain(path: Path, scale: float = 1.0) -> None:
    """Trains everything and writes the weights; `scale` shrinks the work for a trial."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch_size, steps = (256, int(3000 * scale)) if device == "cuda" else (32, int(24000 * scale))
    torch.backends.cuda.matmul.allow_tf32 = True
    jobs, rows = pretraining_rows(int(6000 * scale), int(4000 * scale), int(20000 * scale))
    with Pool() as pool:
        pictures = pool.map(draw, jobs, chunksize=16)
    processor = build_processor()
    chunks = [pictures[start : start + 256] for start in range(0, len(pictures), 256)]
    pixels = torch.cat([processor.image_processor(some, return_tensors="pt")["pixel_values"] for some in chunks])
    pixels = pixels.unflatten(0, (len(pictures), -1)).half().to(device)  # (N, 36, 1536)
    input_ids, labels, numbers = encode(rows, processor)
    print(f"{len(pictures)} pictures, {len(rows)} rows, {steps} steps of {batch_size} on {device}", flush=True)
    model = build_model(processor, weights=None).train()
    position_ids = positions(model, input_ids).to(device)
    input_ids, labels, numbers, model = (each.to(device) for each in (input_ids, labels, numbers, model))
    attend_in_batches(model)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05, betas=(0.9, 0.98))
    generator = torch.Generator(device).manual_seed(SEED)
    for step in range(steps):
        rate = 2e-3 * min(1.0, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = rate
        drawn = torch.randint(len(rows), (batch_size,), generator=generator, device=device)
        seen = numbers[drawn]
        pictures_seen = pixels[seen[seen >= 0]].flatten(0, 1).float()
        loss = loss_of(model, input_ids[drawn], labels[drawn], pictures_seen, position_ids[:, drawn])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps - 1:
            print(f"{step}/{steps} loss {loss.item():.4f}", flush=True)
    save_weights(model, processor, path)


# ---- the command ----


def fingerprint() -> str:
    """Changes when this script, the generators or the weights do."""
    digest = hashlib.sha256()
    for path in (*sorted(HERE.glob("*.py")), HERE / "face_config.yaml", Path(shapes.__file__), WEIGHTS):
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()


def make(output_dir: Path) -> bool:
    """Writes output_dir/model and output_dir/data; returns False when they were there and up to date."""
    stamp = output_dir / "stamp.txt"
    if stamp.is_file() and stamp.read_text() == fingerprint():
        return False
    for part in ("model", "data"):
        shutil.rmtree(output_dir / part, ignore_errors=True)
    stamp.unlink(missing_ok=True)
    write_data(output_dir / "data")
    processor = build_processor()
    build_model(processor).save_pretrained(output_dir / "model")
    processor.save_pretrained(output_dir / "model")
    stamp.write_text(fingerprint())  # last: a killed run is started over
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, help="where model/ and data/ go")
    parser.add_argument("--pretrain", action="store_true", help="train the base, write tiny_weights.safetensors")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the pretraining, for a trial")
    args = parser.parse_args()
    if not (args.pretrain or args.output_dir):
        parser.error("nothing to do: give --output_dir DIR, or --pretrain")
    if args.pretrain:
        pretrain(WEIGHTS, args.scale)
    if args.output_dir:
        print(f"tiny model and data {'written to' if make(args.output_dir) else 'up to date in'} {args.output_dir}")


if __name__ == "__main__":
    main()
