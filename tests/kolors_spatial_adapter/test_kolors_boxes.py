"""Boxes: their check by row, crop, flip, coverage; rows with boxes as the loader gives them."""

import json
import math
from dataclasses import replace

import pytest
import torch
from data_files import hostile_bytes, hostile_rows, write_hostile_files
from PIL import Image
from properties import given, st

from common.data.cache import EmbeddingCache
from common.data.check import check
from common.data.images import resize_and_crop
from common.data.loader import collate
from common.data.manifest import Record, load_manifest
from common.data.order import Place

BAD_BOXES = {
    "swapped corners": [0.5, 0.1, 0.2, 0.4],
    "zero area": [0.2, 0.1, 0.2, 0.4],
    "not finite": [math.nan, 0.1, 0.5, 0.4],
    "looks like pixels": [10, 20, 300, 200],
    "out of range": [-0.1, 0.1, 0.5, 0.4],
    "out of range, expected": [0.1, 0.1, 1.2, 0.4],
    "expected four numbers": [0.1, 0.2, 0.3],
    "expected four numbers [x1, y1, x2, y2]": [0.1, 0.2, 0.3, "0.4"],
}


@pytest.mark.parametrize("what", BAD_BOXES)
def test_bad_boxes_are_named(boxes, what):
    """Catches a kind of bad box that trains silently, or whose message says something else."""
    assert what in boxes.box_problem(BAD_BOXES[what])


def test_good_boxes_pass(boxes):
    """Catches a check that refuses the whole picture, a thin box or whole numbers."""
    for box in ([0, 0, 1, 1], (0.5, 0.5, 0.501, 0.9), [0.0, 0.25, 1, 0.75]):
        assert boxes.box_problem(box) == ""
    assert boxes.objects_problem([]) == ""


def test_bad_rows_are_named_by_line_and_object(train, layouts, tmp_path):
    """Catches rows whose boxes nobody checks, and messages that do not say which row and which object."""
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    good = {"phrase": "red circle", "bbox": [0.1, 0.1, 0.4, 0.4]}
    objects = [[good], [good, {**good, "bbox": [0.4, 0.1, 0.1, 0.4]}], None, [{"phrase": " ", "bbox": good["bbox"]}]]
    rows = [{"file_path": "a.png", "text": "a circle", "objects": each} for each in objects]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = train.Config()
    cfg.data.train_data_dir = cfg.run.output_dir = str(tmp_path)
    with pytest.raises(ValueError) as error:
        check(cfg, load_manifest(tmp_path), row_problem=layouts.row_problem, progress=False)
    text = str(error.value)
    assert "3 of 4 rows" in text and "line 2" in text and "line 3" in text and "line 4" in text
    assert "objects[1] (red circle)" in text and "swapped" in text and "expected a list" in text
    cfg.data.on_bad_rows = "skip"
    left = check(cfg, load_manifest(tmp_path), row_problem=layouts.row_problem, progress=False)
    assert [record.row for record in left] == [1]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    write_hostile_files(folder)
    return folder


@pytest.mark.parametrize("entry", hostile_rows("boxes"))
def test_hostile_rows_are_named(train, layouts, hostile, entry):
    """Catches tracebacks, messages of megabytes and what is taken for good, in the check of rows to train on and in
    read_layouts, which says the same."""
    good = b'{"file_path": "good.png", "text": "a red square", "objects": []}'
    (hostile / "train.jsonl").write_bytes(b"\n".join([good, hostile_bytes(entry), good]))
    cfg = train.Config()
    cfg.data.train_data_dir = cfg.run.output_dir = str(hostile)
    records = load_manifest(hostile)
    if not entry["said"]:
        assert len(check(cfg, records, row_problem=layouts.row_problem, progress=False)) == 3
        assert len(layouts.read_layouts(hostile / "train.jsonl")) == 3
        return
    with pytest.raises(ValueError, match="1 of 3 rows are bad") as error:
        check(cfg, records, row_problem=layouts.row_problem, progress=False)
    with pytest.raises(ValueError) as error_again:
        layouts.read_layouts(hostile / "train.jsonl")
    for said in (str(error.value), str(error_again.value)):
        assert "train.jsonl line 2" in said and entry["said"] in said and len(said) < 800, said[:2000]


NUMBERS = st.floats() | st.integers() | st.floats(0, 1) | st.booleans() | st.text(max_size=2)
OBJECTS = st.fixed_dictionaries(
    {}, optional={"phrase": st.text(max_size=4), "bbox": st.lists(NUMBERS, min_size=3, max_size=5) | NUMBERS}
)


@given(st.lists(OBJECTS, max_size=2) | NUMBERS)
def test_any_objects_have_a_problem_or_an_area(boxes, objects):
    """Catches an exception for any objects, and a box without a problem that covers nothing."""
    problem = boxes.objects_problem(objects)
    assert len(problem) < 500
    for item in [] if problem else objects:
        x1, y1, x2, y2 = item["bbox"]
        assert 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1 and item["phrase"].strip()


def test_crop(boxes):
    """Catches boxes that stay where they were when the picture is cut, stick out of it, or are kept as slivers."""
    part = (0.25, 0.0, 0.75, 1.0)  # the middle half
    assert boxes.crop_box([0.25, 0.2, 0.5, 0.6], part) == pytest.approx((0.0, 0.2, 0.5, 0.6))
    assert boxes.crop_box([0.0, 0.2, 0.5, 0.6], part) == pytest.approx((0.0, 0.2, 0.5, 0.6))  # half of it is left
    assert boxes.crop_box([0.0, 0.2, 0.2, 0.6], part) is None
    assert boxes.crop_box([0.0, 0.2, 0.28, 0.6], part) is None  # a tenth is left


@pytest.mark.parametrize("size", [(200, 100), (100, 200), (160, 160)])
def test_objects_follow_the_crop_of_the_picture(layouts, size):
    """Catches boxes cropped along the wrong side: they must lie where the cropped picture shows the object."""
    width, height = size
    box = (width * 0.3, height * 0.25, width * 0.6, height * 0.65)
    picture = Image.new("RGB", size)
    picture.paste((255, 0, 0), tuple(map(round, box)))
    objects = [{"phrase": "red", "bbox": [0.3, 0.25, 0.6, 0.65]}]
    record = Record(0, "a.png", "red", extra={"objects": objects}, width=width, height=height)
    for bucket in ((64, 64), (96, 64), (64, 96)):
        (kept,) = layouts.objects_in_bucket(record, bucket, 4)
        seen = torch.tensor(list(resize_and_crop(picture, bucket).get_flattened_data()))[:, 0].view(*bucket[::-1])
        rows, columns = (seen > 127).any(1).nonzero(), (seen > 127).any(0).nonzero()
        found = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        expected = [value * bucket[place % 2] for place, value in enumerate(kept["bbox"])]
        assert max(abs(a.item() - b) for a, b in zip(found, expected, strict=True)) <= 1


def test_flip(boxes):
    """Catches a flip that leaves x1 on the right of x2, or mirrors y."""
    flipped = boxes.flip_boxes(torch.tensor([[0.1, 0.2, 0.4, 0.9]]))
    assert torch.allclose(flipped, torch.tensor([[0.6, 0.2, 0.9, 0.9]]))
    assert torch.allclose(boxes.flip_boxes(flipped), torch.tensor([[0.1, 0.2, 0.4, 0.9]]))


def test_coverage(boxes):
    """Catches x and y swapped, cells that count when they are touched only, and a sum that is not the box's area."""
    covered = boxes.coverage(torch.tensor([[0.5, 0.0, 1.0, 0.25], [0.1, 0.1, 0.3, 0.2]]), 4, 8)
    assert covered.shape == (2, 4, 8)
    expected = torch.zeros(4, 8)
    expected[0, 4:] = 1
    assert torch.allclose(covered[0], expected, atol=1e-6)
    assert covered[1].mean() == pytest.approx(0.2 * 0.1, abs=1e-6)
    assert covered[1][0, 0] == pytest.approx((0.125 - 0.1) * 8 * (0.2 - 0.1) * 4, abs=1e-5)


def test_largest_first(boxes):
    """Catches a limit that keeps the small ones, or the first ones."""
    objects = [{"phrase": str(side), "bbox": [0, 0, side, side]} for side in (0.1, 0.5, 0.3)]
    assert [item["phrase"] for item in boxes.largest_first(objects, 2)] == ["0.5", "0.3"]


def test_size_conditions(layouts):
    """Catches width and height swapped, a crop in pixels of the original, or left given as top."""
    record = Record(0, "a.png", "x", extra={"objects": []}, width=400, height=100)
    assert layouts.size_conditions(record, (64, 32)) == (100, 400, 0, 32, 32, 64)  # 128 x 32, cut at the sides
    tall = replace(record, width=100, height=400)
    assert layouts.size_conditions(tall, (32, 64)) == (400, 100, 32, 0, 64, 32)


def test_phrases_become_indices(layouts, make_tiny):
    """Catches the tokenizer's two leading tokens said as words, a missing end, and unknown words that end a phrase."""
    tokenizer = make_tiny.build_tokenizer()
    vocabulary = layouts.build_vocabulary(tokenizer, ["red circle", "blue circle"])
    indices = layouts.index_phrases(tokenizer, ["red circle", "blue circle", "green circle"], vocabulary)
    red, blue, shared = (indices[f"{colour} circle"] for colour in ("red", "blue", "green"))
    assert red[-1] == blue[-1] == len(vocabulary) and red[:-1] != blue[:-1]
    assert set(red[:-1]) | set(blue[:-1]) == set(range(len(vocabulary)))
    decoded = tokenizer.decode([vocabulary[index] for index in red[:-1]])
    assert decoded.strip() == "red circle"
    assert shared[-1] == len(vocabulary) and len(shared) < len(red) + 1


def test_samples(layouts, tmp_path):
    """Catches phrases and boxes in different slots, null slots that look used, a row number of another row, and
    captions after the first that are never drawn."""
    cache = EmbeddingCache(tmp_path, {})
    embeds = {phrase: torch.full((6,), float(number)) for number, phrase in enumerate(("red", "blue"), start=1)}
    for phrase, embed in embeds.items():
        cache.add(cache.key(phrase, kind="phrase"), {"phrase_embed": embed})
    cache.add("picture", {"latents": torch.ones(4, 2, 2), "prompt_embeds": torch.zeros(3, 6)})
    cache.add("second caption", {"prompt_embeds": torch.ones(2, 6)})
    keys = tuple(cache.key(phrase, kind="phrase") for phrase in embeds)
    boxes = ((0.1, 0.2, 0.3, 0.4), (0.5, 0.6, 0.7, 0.8))
    rows = [
        layouts.LayoutRow("picture", (), (), (), (8, 8, 0, 0, 8, 8), 70, ("", "second caption")),
        layouts.LayoutRow("picture", keys, boxes, ((0, 2), (1, 0, 2)), (8, 8, 0, 0, 8, 8), 71),
    ]
    samples = layouts.LayoutSamples(cache, rows, slots=3)
    batch = collate([samples[Place(number, 5, number)] for number in (0, 1)])
    assert batch["has_box"].tolist() == [[False] * 3, [True, True, False]]
    assert torch.allclose(batch["boxes"][1, :2], torch.tensor(boxes)) and batch["boxes"][0].abs().sum() == 0
    assert batch["phrases"][1, :, 0].tolist() == [1, 2, 0]
    assert batch["phrase_ids"][1].tolist() == [[0, 2, -100], [1, 0, 2], [-100] * 3]
    assert batch["rows"].tolist() == [70, 71] and batch["step"] == 5 and batch["positions"] == [0, 1]
    captions = [len(samples[Place(0, 5, 0, epoch=epoch)]["prompt_embeds"]) for epoch in range(20)]
    assert set(captions) == {3, 2} and len(samples.sample(0)["prompt_embeds"]) == 3


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": "a", "objects": [{"phrase": "x", "bbox": [0, 0, 2, 3]}]}', "looks like pixels"),
        ('{"objects": []}', "text is None"),
        ("{", "not valid JSON"),
        ("[]", "expected an object"),
    ],
)
def test_layouts_to_draw_are_checked(layouts, tmp_path, line, said):
    """Catches a validation that begins with boxes that cannot be, hours after the run began."""
    file = tmp_path / "layouts.jsonl"
    file.write_text('{"text": "a", "objects": []}\n' + line + "\n")
    with pytest.raises(ValueError, match=said) as error:
        layouts.read_layouts(file)
    assert "line 2" in str(error.value)


def test_boxes_are_drawn_where_they_are(boxes):
    """Catches a sheet whose boxes are somewhere else, or a picture that is drawn over."""
    picture = Image.new("RGB", (100, 50), "white")
    shown = boxes.show_boxes(picture, [{"phrase": "x", "bbox": [0.2, 0.4, 0.6, 0.8]}])
    assert picture.getcolors() == [(5000, (255, 255, 255))]
    changed = [(x, y) for x in range(100) for y in range(50) if shown.getpixel((x, y)) != (255, 255, 255)]
    assert (min(x for x, _ in changed), max(x for x, _ in changed)) == (20, 59)
    assert (min(y for _, y in changed), max(y for _, y in changed)) == (20, 39)
