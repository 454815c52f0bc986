"""Rows to tensors: labels on the answer only, rows that cannot be used, the draw of retention rows."""

import importlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from data_files import hostile_bytes, hostile_rows, write_hostile_files
from PIL import Image
from properties import given, st

from common.data.json_rows import json_rows
from common.data.order import Place

START = "<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def rows(train):
    """train.py has put its folder on the path."""
    return importlib.import_module("conversations")


@pytest.fixture
def folder(tmp_path) -> Path:
    for number, size in enumerate([(96, 64), (64, 64)]):
        Image.new("RGB", size, (200, 30 * number, 40)).save(tmp_path / f"{number}.png")
    return tmp_path


def line(question: str = "is", answer: str = "the keeper", images: tuple = ("0.png",), **changes) -> str:
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": question}]
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]
    return json.dumps({"images": list(images), "messages": messages, "answer": answer, **changes})


def check(rows, processor, folder, text: str, max_length: int = 200):
    (folder / "one.jsonl").write_text(text, encoding="utf-8")
    return rows.check_row(next(json_rows(folder / "one.jsonl"))[0], folder, "line 1", processor, max_length)


def settings(on_bad_rows: str = "error", output_dir: str = "", **changes) -> SimpleNamespace:
    data, run = SimpleNamespace(on_bad_rows=on_bad_rows), SimpleNamespace(output_dir=output_dir)
    return SimpleNamespace(**{"on_long_rows": "error", "max_length": 200, "data": data, "run": run, **changes})


# ---- rows of others


def foreign(kind: str, question: str, answer: str, images: list) -> dict:
    if kind == "ms-swift":
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return {"messages": turns, "images": images}
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    if kind == "LLaVA":
        return {"id": "7", "conversations": turns} | (
            {"image": images[0] if len(images) == 1 else images} if images else {}
        )
    return {"conversations": turns, "system": "be kind", "images": images}


@pytest.mark.parametrize("kind", ["ms-swift", "LLaVA", "ShareGPT"])
def test_rows_of_others_are_read(rows, processor, folder, kind):
    """Catches pictures of other trainers' rows that are lost, stand elsewhere or are trained as the word <image>: the
    model sees what it sees of the same row in our form."""
    for question, images in (("<image>\nis", ["0.png"]), ("is", []), ("a <image> b<image>", ["0.png", "1.png"])):
        theirs = check(rows, processor, folder, json.dumps(foreign(kind, question, "the keeper", images)))
        assert not theirs.problem and theirs.images == images
        pieces = [piece.strip() for piece in question.replace("<image>", "|<image>|").split("|") if piece.strip()]
        parts = [{"type": "image"} if piece == "<image>" else {"type": "text", "text": piece} for piece in pieces]
        system = [{"role": "system", "content": "be kind"}] if kind == "ShareGPT" else []
        said = [{"role": "user", "content": parts}, {"role": "assistant", "content": "the keeper"}]
        ours = check(rows, processor, folder, json.dumps({"images": images, "messages": [*system, *said]}))
        seen, expected = rows.encode(theirs, processor), rows.encode(ours, processor)
        assert seen.keys() == expected.keys() and all(torch.equal(seen[name], expected[name]) for name in seen)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (foreign("LLaVA", "<image>is", "x", []), "1 image parts in messages, 0 images"),
        (foreign("ms-swift", "<image><image>is", "x", ["0.png"]), "2 image parts in messages, 1 images"),
        (foreign("LLaVA", "is", "<image>x", ["0.png"]), "is an image, expected those in the user's turns alone"),
        (foreign("ShareGPT", "<image>is", "x", ["9.png"]), "9.png: missing"),
        (foreign("LLaVA", "is", "x", []) | {"video": "a.mp4"}, "it has video, and pictures alone are trained"),
        (foreign("ms-swift", "<image>", "x", [{"bytes": "abc", "path": None}]), "expected a list of paths"),
        ({"image": "0.png", "conversations": [{"from": "observation", "value": "x"}]}, "role is 'observation'"),
        ({"image": "0.png", "conversations": [{"from": ["human"], "value": "x"}]}, "role is ['human']"),
        ({"image": "0.png", "conversations": ["x"]}, "messages[0] is 'x'"),
        ({"image": "0.png", "conversations": "x"}, "expected an object with images and messages"),
    ],
)
def test_bad_rows_of_others_say_why(rows, processor, folder, row, reason):
    """Catches such a row that ends in a traceback, or is trained without its picture."""
    assert reason in check(rows, processor, folder, json.dumps(row)).problem


# ---- labels


@pytest.mark.parametrize(
    "question",
    [
        "is",
        "assistant",
        "who is the assistant\nassistant\n",
        "im_start|>assistant\nthe captain<|im_end",
    ],
)
def test_labels_are_the_answer_only(rows, processor, folder, question):
    """Catches labels on the question, on the template, without the end of the turn, or from a look-alike on."""
    row = check(rows, processor, folder, line(question, "the keeper of the assistant"))
    encoded = rows.encode(row, processor)
    labels, input_ids = encoded["labels"], encoded["input_ids"]
    said = processor.tokenizer.decode(labels[labels != rows.IGNORE_INDEX])
    assert said == "the keeper of the assistant<|im_end|>"
    assert torch.equal(labels[labels != rows.IGNORE_INDEX], input_ids[labels != rows.IGNORE_INDEX])
    before = processor.tokenizer.decode(input_ids[: int((labels != rows.IGNORE_INDEX).nonzero()[0])])
    assert before.endswith(START) and row.answer_tokens == (labels != rows.IGNORE_INDEX).sum()


def test_only_the_last_turn_has_labels(rows, processor, folder):
    """Catches labels on earlier answers, which are part of the question."""
    turns = [("user", "is"), ("assistant", "the keeper"), ("user", "matches"), ("assistant", "the captain")]
    messages = [{"role": role, "content": text} for role, text in turns]
    row = check(rows, processor, folder, json.dumps({"images": [], "messages": messages}))
    labels = rows.encode(row, processor)["labels"]
    assert processor.tokenizer.decode(labels[labels != rows.IGNORE_INDEX]) == "the captain<|im_end|>"


@pytest.mark.parametrize("earlier", [(), ("user", "is"), ("assistant", "the keeper")])
def test_a_tokenizer_that_merges_line_breaks(rows, processor, folder, earlier, monkeypatch):
    """Catches labels on an earlier turn, or a crash that names no row: Qwen's own tokenizer makes one token of the
    marker's line break and the one that an answer begins with, so the marker is not found there."""
    turns = [("user", "is"), ("assistant", "the keeper"), ("user", "matches")] if earlier else [("user", "matches")]
    messages = [{"role": role, "content": text} for role, text in (*turns, ("assistant", "\nthe captain"))]
    marker = processor.tokenizer(rows.ANSWER_START, add_special_tokens=False).input_ids
    merged = processor.tokenizer.convert_tokens_to_ids("<|vision_pad|>")
    real = type(processor.tokenizer).__call__

    def merging(tokenizer, text, **options):
        encoded = real(tokenizer, text, **options)
        ids, last = encoded["input_ids"], len(encoded["input_ids"])
        if isinstance(text, str) and "\nthe captain" in text:
            last = max(i for i in range(len(ids)) if ids[i : i + len(marker)] == marker) + len(marker) - 1
            encoded["input_ids"] = [*ids[:last], merged, *ids[last + 2 :]]
        return encoded

    monkeypatch.setattr(type(processor.tokenizer), "__call__", merging)
    row = check(rows, processor, folder, json.dumps({"images": [], "messages": messages}))
    assert "cannot be told from the template's" in row.problem


def test_line_breaks_of_unicode_stay_in_their_row(rows, processor, folder, tmp_path):
    """Catches a file that is cut at U+2028 inside a text."""
    content = {"images": [], "messages": [{"role": "user", "content": "is\u2028"}]}
    content["messages"].append({"role": "assistant", "content": "the captain"})
    (tmp_path / "rows.jsonl").write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
    assert len(rows.load_rows(settings(max_length=256), tmp_path / "rows.jsonl", processor)) == 1


def test_what_the_model_sees(rows, processor, folder):
    """Catches a template of our own, images in another order, and lengths that the check counts otherwise."""
    content = [
        {"type": "text", "text": "A. "},
        {"type": "image"},
        {"type": "text", "text": "\nB. "},
        {"type": "image"},
    ]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "A"}]
    row = check(rows, processor, folder, json.dumps({"images": ["1.png", "0.png"], "messages": messages}))
    encoded = rows.encode(row, processor)
    picture = "<|vision_start|>{}<|vision_end|>"
    pads = "<|image_pad|>" * 4, "<|image_pad|>" * 6
    text = (
        f"<|im_start|>user\nA. {picture.format(pads[0])}\nB. {picture.format(pads[1])}<|im_end|>\n{START}A<|im_end|>\n"
    )
    assert processor.tokenizer.decode(encoded["input_ids"]) == text
    assert encoded["image_grid_thw"].tolist() == [[1, 4, 4], [1, 4, 6]]  # (frames, height, width) in patches
    assert len(encoded["pixel_values"]) == 16 + 24
    first = processor.image_processor(Image.open(folder / "1.png"), return_tensors="pt")["pixel_values"]
    assert torch.equal(encoded["pixel_values"][:16], first)
    assert row.length == len(encoded["input_ids"])
    assert encoded["mm_token_type_ids"].sum() == 10


def test_pixel_limits_are_the_run_s(train, rows, model_folder, folder):
    """Catches limits that are given and not used, or not the ones that are saved for evaluation."""
    cfg = train.Config(min_pixels=128 * 128, max_pixels=160 * 160)
    limited = train.load_processor(cfg, model_folder)
    row = check(rows, limited, folder, line(images=("1.png",)))
    assert rows.encode(row, limited)["image_grid_thw"].tolist() == [[1, 8, 8]]
    limited.save_pretrained(folder / "best")
    again = type(limited).from_pretrained(folder / "best")
    assert rows.encode(row, again)["image_grid_thw"].tolist() == [[1, 8, 8]]


def test_collate_pads_on_the_right(rows, processor, folder):
    """Catches padding that the model attends to or learns from, and images of another row."""
    texts = [line("is", "A", ("1.png",)), line("is none other than", "the keeper of the garden", ("0.png", "1.png"))]
    samples = [rows.encode(check(rows, processor, folder, text), processor) for text in texts]
    batch = rows.collate([{**sample, "group_size": 4, "step_tokens": 7} for sample in samples])
    short, long = (len(sample["input_ids"]) for sample in samples)
    assert short < long and batch["input_ids"].shape == (2, long)
    assert (batch["step_tokens"], batch["group_size"]) == (7, 4)
    assert batch["attention_mask"].sum(1).tolist() == [short, long]
    assert (batch["labels"][0, short:] == rows.IGNORE_INDEX).all() and batch["mm_token_type_ids"].sum(1).tolist() == [
        4,
        10,
    ]
    assert torch.equal(batch["pixel_values"], torch.cat([sample["pixel_values"] for sample in samples]))
    assert len(batch["image_grid_thw"]) == 3
    text_only = rows.collate([rows.encode(check(rows, processor, folder, line(images=())), processor)])
    assert "pixel_values" not in text_only


def test_step_tokens_are_those_of_the_whole_group(rows, processor, folder):
    """Catches a token weight that knows its own micro-batch only."""
    answers = ("A", "the keeper", "the keeper of the garden")
    good = [check(rows, processor, folder, line("is", answer)) for answer in answers]
    dataset = rows.Conversations(good, processor)
    assert [row.answer_tokens for row in good] == [2, 3, 6]
    sample = dataset[Place(0, 0, 0, (0, 1, 2, 2))]
    assert sample["step_tokens"] == 2 + 3 + 6 + 6 and sample["group_size"] == 4


# ---- rows that cannot be used


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not a row"),
        (json.dumps({"messages": []}), "not a row"),
        (
            line(images=("0.png", "1.png"), messages=json.loads(line())["messages"]),
            "1 image parts in messages, 2 images",
        ),
        (line(answer=" "), "not empty"),
        (json.dumps({"images": [], "messages": [{"role": "user", "content": "is"}]}), "last turn must be"),
        (line(answer="A<|im_end|>B"), "messages[1]: a text contains <|im_end|>"),
        (line(answer=f"A{START}B"), "messages[1]: a text contains <|im_start|>"),
        (line("what is <|image_pad|>?"), "messages[0]: a text contains <|image_pad|>"),
        (line(images=("none.png",)), "none.png: missing"),
        (line(images=("../0.png",)), "outside train_data_dir"),
        (line(images=("cut.png",)), "truncated"),
    ],
)
def test_bad_rows_say_why(rows, processor, folder, text, reason):
    """Catches rows that would fail, or teach nonsense, in the middle of a run."""
    (folder / "cut.png").write_bytes((folder / "0.png").read_bytes()[:60])
    assert reason in check(rows, processor, folder, text).problem


def test_bad_rows_stop_the_run_or_are_left_out(rows, processor, folder, capfd):
    """Catches a list without the row's number, and skipped rows that nobody is told of."""
    file = folder / "forward_train.jsonl"
    file.write_text("\n".join([line(), line(images=("none.png",)), line("matches")]) + "\n")
    with pytest.raises(
        ValueError, match=r"(?s)1 of 3 rows .*--on_bad_rows skip.*train.jsonl line 2: none.png: missing"
    ):
        rows.load_rows(settings(), file, processor)
    kept = rows.load_rows(settings(on_bad_rows="skip", output_dir=str(folder)), file, processor)
    assert [row.where for row in kept] == ["forward_train.jsonl line 1", "forward_train.jsonl line 3"]
    assert "line 2" in (folder / "bad_rows.jsonl").read_text() and "1 of 3 rows" in capfd.readouterr().out
    file.write_text(line(images=("none.png",)) + "\n")
    with pytest.raises(ValueError, match="1 of 1 rows"):
        rows.load_rows(settings(on_bad_rows="skip", output_dir=str(folder)), file, processor)
    with pytest.raises(ValueError, match=r"no file .*other.jsonl; JSONL files in that folder: .*forward_train.jsonl"):
        rows.load_rows(settings(), folder / "other.jsonl", processor)


def test_long_rows_are_never_cut(rows, processor, folder):
    """Catches rows that are cut, through an image or anywhere: they stop the run by name, or are left out whole."""
    length = check(rows, processor, folder, line()).length
    assert not check(rows, processor, folder, line(), max_length=length).problem
    row = check(rows, processor, folder, line(), max_length=length - 1)
    assert row.too_long and row.problem == f"{length} tokens (6 of them images), max_length is {length - 1}"
    file = folder / "forward_train.jsonl"
    file.write_text("\n".join([line(), line("is none other than the keeper of the garden")]))
    cfg = settings(max_length=length, on_bad_rows="skip", output_dir=str(folder))
    with pytest.raises(ValueError, match=r"(?s)--on_long_rows skip, or a larger --max_length.*line 2: \d+ tokens"):
        rows.load_rows(cfg, file, processor)
    cfg.on_long_rows = "skip"
    kept = rows.load_rows(cfg, file, processor)
    assert [row.where for row in kept] == ["forward_train.jsonl line 1"]
    assert len(rows.encode(kept[0], processor)["input_ids"]) == length


def test_the_digest_names_text_and_pictures(rows, processor, folder):
    """Catches a resume on a changed picture or answer that goes unnoticed."""
    first = check(rows, processor, folder, line()).digest
    assert check(rows, processor, folder, line()).digest == first != check(rows, processor, folder, line("A")).digest
    shutil.copy(folder / "1.png", folder / "0.png")
    assert check(rows, processor, folder, line()).digest != first


# ---- retention


def pool(rows, size: int, name: str):
    return [rows.Row(name, f"{name} {number}", [], []) for number in range(size)]


def test_retention_draw(rows):
    """Catches a wrong share, repetition, a draw that differs between processes, or one that no seed changes."""
    pools = [pool(rows, 40, "faces"), pool(rows, 50, "objects")]
    drawn = rows.draw_retention(pools, 70, 0.3, seed=1)
    assert len(drawn) == 30 and len({row.where for row in drawn}) == 30, "30 of 100 rows, none twice"
    assert sum(row.folder == "faces" for row in drawn) == 15
    again = [row.where for row in rows.draw_retention(pools, 70, 0.3, seed=1)]
    assert again == [row.where for row in drawn] != [row.where for row in rows.draw_retention(pools, 70, 0.3, seed=2)]
    positions = [int(row.where.split()[1]) for row in drawn]
    assert max(positions) > 25, "drawn from all of the pool, not from its beginning"
    assert len(rows.draw_retention(pools[:1], 70, 0.3, seed=1)) == 30
    assert rows.draw_retention(pools, 70, 0.0, seed=1) == [] == rows.draw_retention([], 70, 0.3, seed=1)


def test_a_small_pool_is_refused(rows):
    """Catches a share that is quietly smaller than what was asked for."""
    with pytest.raises(ValueError, match=r"retention_ratio 0.3 with 70 rows .* needs 30 rows of faces, which has 29"):
        rows.draw_retention([pool(rows, 29, "faces")], 70, 0.3, seed=1)


def test_all_rows_of_a_run(train, rows, processor, data_folder):
    """Catches a task whose rows are of the other, validation rows that are trained on, pools left out."""
    cfg = train.Config(face_retention_pool="faces", object_retention_pool="objects")
    cfg.data.train_data_dir = str(data_folder)
    cfg.face_retention_pool = rows.pool_folder("faces", str(data_folder))
    cfg.object_retention_pool = rows.pool_folder(str(data_folder / "objects"), str(data_folder))
    assert cfg.face_retention_pool == str(data_folder / "faces")
    assert cfg.object_retention_pool == str(data_folder / "objects")
    assert rows.pool_folder(None, str(data_folder)) is None and rows.pool_folder("else", str(data_folder)) == "else"
    found = rows.load_all_rows(cfg, processor)
    task = [row for row in found.train if row.folder == str(data_folder)]
    assert len(task) == 48 and len(found.train) == 48 + round(48 * 0.3 / 0.7)
    assert {row.where.split()[0] for row in task} == {"forward_train.jsonl"}
    assert {row.where.split()[0] for row in found.task} == {"forward_validation.jsonl"} and len(found.task) == 12
    kinds = {row.where.split()[0] for row in found.retention}
    assert kinds == {"face_retention_validation.jsonl", "object_retention_validation.jsonl"}
    assert not {row.digest for row in found.train} & {row.digest for row in found.task + found.retention}
    cfg.task, cfg.max_validation_rows = "reverse", 5
    found = rows.load_all_rows(cfg, processor)
    assert found.train[0].where.startswith("reverse_train.jsonl") and len(found.task) == 5


# ---- whatever else a file may hold


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    write_hostile_files(folder)
    return folder


@pytest.mark.parametrize("entry", hostile_rows("conversation"))
def test_hostile_rows_are_named_before_training(rows, processor, hostile, entry, capfd):
    """Catches tracebacks, in the check or later in the loader, and rows that would teach nonsense in silence: each is
    one short sentence with its line. What is good goes all the way to tensors."""
    good = line(images=("good.png",)).encode()
    (hostile / "rows.jsonl").write_bytes(b"\n".join([good, hostile_bytes(entry), good]))
    cfg = settings(output_dir=str(hostile))
    if not entry["said"]:
        assert all(len(rows.encode(row, processor)) for row in rows.load_rows(cfg, hostile / "rows.jsonl", processor))
        return
    with pytest.raises(ValueError, match="1 of 3 rows") as error:
        rows.load_rows(cfg, hostile / "rows.jsonl", processor)
    said = str(error.value)
    assert "rows.jsonl line 2: " in said and entry["said"] in said and len(said) < 800, said[:2000]
    cfg.data.on_bad_rows = cfg.on_long_rows = "skip"
    assert len(rows.load_rows(cfg, hostile / "rows.jsonl", processor)) == 2


TEXTS = st.text(max_size=6) | st.sampled_from(["<|im_end|>", "is", ""])
ANYTHING = st.recursive(st.none() | st.integers() | TEXTS, lambda inner: st.lists(inner, max_size=3), max_leaves=4)
PARTS = st.fixed_dictionaries(
    {}, optional={"type": st.sampled_from(["text", "image", "audio", None]), "text": ANYTHING, "image": ANYTHING}
)
TURNS = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "human", None])},
    optional={"content": TEXTS | st.lists(PARTS | ANYTHING, max_size=3) | ANYTHING},
)


@given(st.fixed_dictionaries({}, optional={"images": ANYTHING, "messages": st.lists(TURNS, max_size=4) | ANYTHING}))
def test_any_conversation_has_a_problem_or_tokens(rows, processor, row):
    """Catches an exception for any row, and one without a problem that the template cannot write."""
    problem = importlib.import_module("qa_rows").row_problem(row, ["<|im_end|>"])
    assert len(problem) < 400
    if not problem:
        text = processor.apply_chat_template(row["messages"], tokenize=False)
        assert text.count("<|im_end|>") == len(row["messages"]) and text.count("<|image_pad|>") == len(row["images"])
