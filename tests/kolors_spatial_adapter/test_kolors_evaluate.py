"""evaluate.py: adherence by hand-counted cases, detectors, the whole command on adapters that do and do not act."""

import json
import random
import sys
from pathlib import Path

import pytest
import torch
from helpers import load_script
from PIL import Image

from tiny import shapes

LEFT, RIGHT, HALF = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0), (0.0, 0.0, 0.25, 1.0)


@pytest.fixture(scope="module")
def evaluate(recipe):
    return load_script(recipe / "evaluate.py")


def layout(*objects: tuple) -> dict:
    return {"text": "a picture", "objects": [{"phrase": phrase, "bbox": list(box)} for phrase, box in objects]}


# ---------------------------------------------------------------- counting


def test_iou(evaluate):
    """Catches an overlap of boxes that do not touch, and a union that counts the overlap twice."""
    assert evaluate.iou(LEFT, LEFT) == 1 and evaluate.iou(LEFT, RIGHT) == 0
    assert evaluate.iou(LEFT, HALF) == evaluate.iou(HALF, LEFT) == 0.5
    assert evaluate.iou((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert evaluate.iou((0, 0, 1, 1), (2, 2, 3, 3)) == 0, "apart in both directions: two negatives are no area"


def test_each_thing_belongs_to_one_object(evaluate):
    """Catches one detection that serves two objects, another phrase's box that counts, a first match that takes the
    better one's place."""
    found = evaluate.Detection
    row = layout(("cat", LEFT), ("cat", RIGHT))["objects"]
    assert evaluate.object_ious(row, [found("cat", LEFT, 0.9)]) == [1, 0]
    near = layout(("cat", HALF), ("cat", LEFT))["objects"]
    assert evaluate.object_ious(near, [found("cat", LEFT, 0.9)]) == [0, 1]
    assert evaluate.object_ious(row, [found("dog", LEFT, 0.9)]) == [0, 0]
    assert evaluate.object_ious(row, [found("cat", RIGHT, 0.2), found("cat", HALF, 0.9)]) == [0.5, 1]
    one = layout(("cat", LEFT))["objects"]
    assert evaluate.object_ious(one, [found("cat", HALF, 0.9), found("cat", LEFT, 0.1)]) == [1]


def test_average_precision_by_hand(evaluate):
    """Catches a precision without its envelope, detections in another order than their scores', a second detection of
    the same object that counts, matches across pictures, recall over all detections instead of all objects."""
    found = evaluate.Detection
    rows = [layout(("cat", LEFT), ("cat", RIGHT)), layout(("cat", LEFT))]
    right = [found("cat", LEFT, 0.9), found("cat", RIGHT, 0.7)], [found("cat", LEFT, 0.5)]
    assert evaluate.precision_and_recall(rows, right, 0.5) == (pytest.approx(1), 1)
    nothing = [[], []]
    assert evaluate.precision_and_recall(rows, nothing, 0.5) == (0, 0)
    # by score: right, wrong (again the left one), right, nothing for the second picture: recall 1/3, 1/3, 2/3
    some = [found("cat", LEFT, 0.9), found("cat", LEFT, 0.8), found("cat", RIGHT, 0.7)], []
    assert evaluate.precision_and_recall(rows, some, 0.5) == (pytest.approx((34 + 33 * 2 / 3) / 101), 2 / 3)
    elsewhere = [], [found("cat", RIGHT, 0.9)]
    assert evaluate.precision_and_recall(rows, elsewhere, 0.5) == (0, 0)
    loose = [found("cat", HALF, 0.9)], []
    assert evaluate.precision_and_recall(rows, loose, 0.5)[1] == pytest.approx(1 / 3)
    assert evaluate.precision_and_recall(rows, loose, 0.55)[1] == 0
    # the wrong one first: precision 0, then 1/2, and 1/2 at every recall up to 1/3
    late = [found("cat", RIGHT, 0.1)], [found("cat", RIGHT, 0.9)]
    assert evaluate.precision_and_recall(rows, late, 0.5)[0] == pytest.approx(34 * 0.5 / 101)


def test_adherence(evaluate):
    """Catches success that one object of several is enough for, thresholds left out, means by picture."""
    found = evaluate.Detection
    rows = [layout(("cat", LEFT), ("dog", RIGHT)), layout(("cat", LEFT))]
    detections = [[found("cat", LEFT, 1), found("dog", LEFT, 1)], [found("cat", HALF, 1)]]
    result = evaluate.adherence(rows, detections)
    assert result["mean_iou"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert result["success"] == {"1": 1, "2": 0}
    assert result["AR"] == pytest.approx((2 + 9) / 30) and result["AP50"] > result["AP"] > 0
    perfect = [[found(o["phrase"], tuple(o["bbox"]), 1) for o in row["objects"]] for row in rows]
    result = evaluate.adherence(rows, perfect)
    assert result["mean_iou"] == result["AR"] == 1 and result["AP"] == pytest.approx(1)
    assert result["success"] == {"1": 1, "2": 1}


# ---------------------------------------------------------------- detectors


def test_finder_reads_drawn_layouts_back(evaluate, make_tiny):
    """Catches boxes in pixels, x and y swapped, colours or shapes under another name."""
    rng = random.Random(5)
    pairs = [make_tiny.draw_layout(rng, 1 + i % 2) for i in range(30)]
    rows = [row for _, row in pairs]
    wide = shapes.draw([shapes.Found("red", "circle", (10, 20, 40, 50))], size=(128, 64))
    pairs.append((wide, layout(("red circle", (10 / 128, 20 / 64, 40 / 128, 50 / 64)))))
    rows.append(pairs[-1][1])
    phrases = [[item["phrase"] for item in row["objects"]] for row in rows]
    detections = [evaluate.find_drawn_shapes(picture, some) for (picture, _), some in zip(pairs, phrases, strict=True)]
    result = evaluate.adherence(rows, detections)
    assert result["mean_iou"] > 0.9 and result["success"] == {"1": 1, "2": 1} and result["AP50"] > 0.99
    assert evaluate.find_drawn_shapes(wide, ["blue circle"]) == []


def test_finder_refuses_other_phrases(evaluate):
    """Catches an evaluation that finds nothing because its detector knows no such thing."""
    with pytest.raises(ValueError, match="'a cat'; give --detector"):
        evaluate.load_detector("shapes", [layout(("red circle", LEFT), ("a cat", LEFT))])


def clip_tokenizer(folder: Path):
    """Byte-level, without merges, of CLIP's class."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    names = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def tiny_owl(tmp_path_factory) -> Path:
    """A random OWLv2 of the real classes, whose boxes are those of its 4 x 4 patches."""
    from transformers import Owlv2Config, Owlv2ForObjectDetection, Owlv2ImageProcessor, Owlv2Processor

    folder = tmp_path_factory.mktemp("owl")
    tokenizer = clip_tokenizer(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": len(tokenizer), "max_position_embeddings": 16, "pad_token_id": 1}
    text |= {"bos_token_id": len(tokenizer) - 2, "eos_token_id": len(tokenizer) - 1}
    config = Owlv2Config(
        text_config=text, vision_config={**sizes, "image_size": 64, "patch_size": 16}, projection_dim=32
    )
    torch.manual_seed(0)
    model = Owlv2ForObjectDetection(config)
    for part in (model.box_head.dense2, model.class_head.logit_scale, model.class_head.logit_shift):
        for parameter in part.parameters():
            parameter.data.zero_()  # scores near a half
    model.save_pretrained(folder)
    Owlv2Processor(Owlv2ImageProcessor(size={"height": 64, "width": 64}), tokenizer).save_pretrained(folder)
    return folder


def test_open_vocabulary_detector(evaluate, tiny_owl):
    """Catches labels that are not the layout's phrases, boxes in pixels, beyond the picture or of another shape than
    it (OWLv2 pads to a square), phrases that hear of each other. What the random model finds is of no meaning."""
    phrases = ["a red circle", "ein Hut"]
    detect = evaluate.load_detector(str(tiny_owl), [layout((phrase, LEFT)) for phrase in phrases])
    picture = shapes.draw([shapes.Found("red", "circle", (10, 20, 40, 50))], size=(128, 64))
    detections = detect(picture, phrases)
    assert {item.phrase for item in detections} <= set(phrases) and detections
    centres = {(x, y) for x in (0.25, 0.5, 0.75, 1) for y in (0.5, 1)}  # y 1.5 and 2 are in the padding below
    expected = {(x - 0.125, y - 0.25, min(x + 0.125, 1), min(y + 0.25, 1)) for x, y in centres}
    for item in detections:
        assert min(max(abs(a - b) for a, b in zip(item.bbox, box, strict=True)) for box in expected) < 0.02, item
        assert 0 < item.score <= 1
    alone = detect(picture, phrases[:1])
    assert sorted(alone, key=str) == sorted((d for d in detections if d.phrase == phrases[0]), key=str)


# ---------------------------------------------------------------- the command


@pytest.fixture
def run(pipeline, adapter_module, tmp_path) -> Path:
    """A run's folder: config.yaml, three checkpoints of which only the second acts, the last one exported too; the
    data it names has four layouts."""
    data = tmp_path / "data"
    data.mkdir()
    rows = [layout(("red circle", LEFT)), layout(("blue square", LEFT), ("red circle", RIGHT))] * 2
    (data / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "run"
    base = tmp_path / "model"
    pipeline.save_pretrained(base)
    adapter = adapter_module.new_adapter(pipeline.unet, rank=32, token_width=64, max_objects=4)
    for folder, gate in (
        ("checkpoint-9", 0.0),
        ("checkpoint-20", 1.0),
        ("checkpoint-100", 0.0),
        ("export/adapter", 1),
    ):
        for layer in adapter.layers.values():
            layer.gate.data.fill_(gate)
        adapter_module.save_adapter(adapter, out / folder)
    values = {"pretrained_model_name_or_path": str(base), "train_data_dir": str(data), "resolution": 64}
    values |= {"num_inference_steps": 2, "guidance_scale": 2.0, "tau": 1.0}
    (out / "config.yaml").write_text(json.dumps(values))
    return out


def pictures(folder: Path) -> list[bytes]:
    return [Image.open(file).tobytes() for file in sorted(folder.iterdir())]


def run_evaluate(evaluate, monkeypatch, *flags: object) -> dict:
    """evaluate.main() in this process; returns results.json."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, flags)])
    evaluate.main()
    out = flags[flags.index("--output_dir") + 1] if "--output_dir" in flags else flags[1] / "evaluation"
    return json.loads((out / "results.json").read_text())


def test_settings_share_their_noise(evaluate, run, monkeypatch):
    """Catches an adapter that acts when it is off, another noise for each setting, a tau that is not passed on."""
    results = run_evaluate(evaluate, monkeypatch, "--run", run, "--tau", 0, 0.5, 1)
    out = run / "evaluation"
    assert list(results["settings"]) == ["off", "adapter tau 0", "adapter tau 0.5", "adapter tau 1"]
    off, none, half, whole = (pictures(out / "pictures" / name.replace(" ", "_")) for name in results["settings"])
    assert off == none and len(set(off)) == 4, "tau 0 is off; every row has noise of its own"
    assert all(len({a, b, c}) == 3 for a, b, c in zip(off, half, whole, strict=True))
    assert all(abs(value) > 0.7 for value in results["gates"]["adapter"].values())
    text = (out / "table.md").read_text()
    assert text.count("| adapter tau") == 3 and "success, 1 object |" in text and "success, 2 objects |" in text
    assert "up_blocks" in text and results["layouts"] == 4
    assert Image.open(out / "sheet.png").size == (4 * 264, 20 + 4 * 280)


def test_the_best_checkpoint_is_kept(evaluate, run, adapter_module, pipeline, monkeypatch):
    """Catches a best checkpoint by name, by loss or the last one; checkpoints in alphabetical order; layouts or noise
    that differ between them. The detector finds everything in its place, but only in pictures that are not those
    without an adapter."""
    seen: list[bytes] = []

    def detect(picture: Image.Image, phrases: list[str]) -> list:
        seen.append(picture.tobytes())
        boxes = {"red circle": LEFT if len(phrases) == 1 else RIGHT, "blue square": LEFT}
        acts = seen[-1] not in seen[:4]
        return [evaluate.Detection(phrase, boxes[phrase], 1.0) for phrase in phrases] if acts else []

    monkeypatch.setattr(evaluate, "load_detector", lambda name, rows: detect)
    results = run_evaluate(evaluate, monkeypatch, "--run", run, "--checkpoints")
    names = [f"checkpoint-{step} tau 1" for step in (9, 20, 100)]
    assert list(results["settings"]) == ["off", *names] and results["best"] == names[1]
    assert [results["settings"][name]["mean_iou"] for name in names] == [0, 1, 0]
    best = adapter_module.load_adapter(run / "evaluation/best_adapter", pipeline.unet)
    assert all(layer.gate.item() == 1 for layer in best.layers.values())


def test_mistakes_are_said_in_a_sentence(evaluate, run, monkeypatch):
    """Catches a traceback, or an empty result, where something is missing."""
    (run.parent / "empty.jsonl").write_text(json.dumps(layout()) + "\n")
    with pytest.raises(ValueError, match=r"no layout in .* has objects"):
        run_evaluate(evaluate, monkeypatch, "--run", run, "--layouts", run.parent / "empty.jsonl")
    for folder in run.glob("checkpoint-*"):
        folder.rename(run / f"old-{folder.name}")
    with pytest.raises(ValueError, match="no checkpoint-"):
        run_evaluate(evaluate, monkeypatch, "--run", run, "--checkpoints")
