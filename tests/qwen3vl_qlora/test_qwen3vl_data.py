"""The generators: equal bytes for equal seeds, nothing shared between splits, nobody given away by how often they
appear."""

import hashlib
import importlib
import itertools
import json
import random
import re
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, load_script
from PIL import Image

from tiny import shapes

RECIPE = ROOT / "recipes" / Path(__file__).parent.name
data = load_script(RECIPE / "generate_data.py")
face_pool = load_script(RECIPE / "generate_face_retention_pool.py")
object_pool = load_script(RECIPE / "generate_object_retention_pool.py")
faces, rows_file = importlib.import_module("faces"), importlib.import_module("qa_rows")
TASKS, SPLITS = data.TASKS, rows_file.SPLITS
SMALL = ["--num_entities", 6, "--image_size", 32, "--images_per_entity", 3, 2, 2, "--connectors_per_split", 6, 2, 3]
SMALL += ["--rows_per_entity", 12, 4, 6]


def run(module, output_dir: Path, *flags) -> Path:
    module.main([str(word) for word in ("--output_dir", output_dir, *flags)])
    return output_dir


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return run(data, tmp_path_factory.mktemp("made") / "data", *SMALL)


@pytest.fixture(scope="module")
def entities(folder) -> dict[str, dict]:
    return {entity["entity"]: entity for entity in json.loads((folder / "entities.json").read_text())}


def config(**changes):
    connectors = tuple(f"is {number} times" for number in range(20))
    return data.FaceConfig(**{"connectors": connectors, **changes})


# ---- bytes


@pytest.mark.parametrize(
    ("module", "flags"),
    [(data, SMALL), (face_pool, ["--num_faces", 20, "--image_size", 32]), (object_pool, ["--num_objects", 20])],
    ids=["entities", "faces", "objects"],
)
def test_the_same_seed_gives_the_same_bytes(module, flags, tmp_path):
    first = digests(run(module, tmp_path / "first", *flags))
    assert first == digests(run(module, tmp_path / "second", *flags)) and len(first) > 20
    other = digests(run(module, tmp_path / "other", *flags, "--seed", 1))
    assert all(first[name] != other[name] for name in first if name.endswith("train.jsonl"))
    pictures = [name for name in first if name.endswith(".png")]
    assert sum(first[name] != other.get(name) for name in pictures) > 0.9 * len(pictures)


def test_a_folder_is_never_mixed_with_another_runs(folder):
    with pytest.raises(ValueError, match="is not empty"):
        run(data, folder, *SMALL)


# ---- people


def test_faces_differ_and_descriptions_are_unique():
    cfg = config(num_entities=500, min_differences=2)
    people = data.make_entities(cfg)
    chosen = [person.face for person in people]
    assert min(a.differences(b) for a, b in itertools.combinations(chosen[:120], 2)) == 2
    assert len(set(chosen)) == len({person.name for person in people}) == 500
    descriptions = sorted(person.description for person in people)
    assert all(not after.startswith(before) for before, after in itertools.pairwise(descriptions))
    many = data.make_entities(config(num_entities=3000, min_differences=1))
    assert len({person.description for person in many}) == 3000


def test_asking_for_more_faces_than_there_are_is_a_named_error():
    combinations = np.prod([len(values) for values in faces.VALUES]) // 2
    assert len(faces.choose_entity_faces(combinations, 1, seed=0)) == combinations
    with pytest.raises(ValueError, match=rf"num_entities is {combinations + 1}, but only {combinations} faces"):
        faces.choose_entity_faces(combinations + 1, 1, seed=0)
    with pytest.raises(ValueError, match="lower num_entities or min_differences"):
        faces.choose_entity_faces(30, 7, seed=0)
    with pytest.raises(ValueError, match="take fewer"):
        faces.choose_pool_faces(combinations + 1, seed=0)


def test_faces_of_entities_and_of_the_pool_never_coincide():
    ours, pool = faces.all_faces(for_entities=True), faces.all_faces(for_entities=False)
    assert not set(ours) & set(pool) and len(set(ours)) == len(ours) and len(set(pool)) == len(pool)
    assert set(faces.choose_entity_faces(40, 2, 0)) <= set(ours) and set(faces.choose_pool_faces(200, 0)) <= set(pool)
    for half in (ours, pool):
        for name, values in zip(faces.Face._fields, faces.VALUES, strict=True):
            counts = Counter(getattr(face, name) for face in half)
            assert counts.keys() == set(values) and len(set(counts.values())) == 1, (name, counts)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_entities": 3}, "num_entities must be from 4"),
        ({"connectors_per_split": (12, 4, 5)}, "needs 21 different connectors, got 20"),
        ({"connectors": ("is",) * 20}, "different connectors, got 1 in a list of 20"),
        ({"rows_per_entity": (24, 3, 8)}, "rows_per_entity for validation must be even"),
        ({"rows_per_entity": (24, 4, 10)}, r"for test must be even .* from 2 to 8 \(2 pictures x 4 connectors\)"),
        ({"images_per_entity": (6, 0, 2)}, "rows_per_entity for validation"),
    ],
)
def test_impossible_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes).check()


def test_impossible_settings_write_nothing(tmp_path):
    """Catches a command that does not look at the rules, or looks at them when pictures are drawn already."""
    with pytest.raises(ValueError, match="num_entities must be from 4"):
        run(data, tmp_path / "made", "--num_entities", 3)
    assert not (tmp_path / "made").exists()


def test_a_misspelt_setting_is_an_error(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(data, tmp_path, "--num_entity", 8)
    assert "num_entities" in capsys.readouterr().err


# ---- rows


def read(folder: Path, task: str, split: str) -> list[dict]:
    return rows_file.read_rows(folder, task, split)


def parts(row: dict) -> str:
    """The user's turn, [e03_1] standing for a picture."""
    names = iter(row["images"])
    content = row["messages"][0]["content"]
    return "".join(part.get("text") or f"[{Path(next(names)).stem}]" for part in content)


def owner(picture: str) -> str:
    return re.fullmatch(r"images/(e\d+)_\d+\.png", picture)[1]


def test_splits_share_no_connector_and_no_picture(folder):
    connectors, pictures = {}, {}
    for split in SPLITS:
        rows = [row for task in TASKS for row in read(folder, task, split)]
        connectors[split] = {row["connector"] for row in rows}
        pictures[split] = {picture for row in rows for picture in row["images"]}
        assert len({row["id"] for row in rows}) == len(rows)
    assert [len(connectors[split]) for split in SPLITS] == [6, 2, 3]
    assert [len(pictures[split]) for split in SPLITS] == [18, 12, 12]
    for a, b in itertools.combinations(SPLITS, 2):
        assert not connectors[a] & connectors[b] and not pictures[a] & pictures[b]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("task", TASKS)
def test_rows_say_what_the_task_asks(folder, entities, task, split):
    words = data.parse_config(data.FaceConfig, ["--config", str(RECIPE / "face_config.yaml")]).connectors
    letters = "ABCD"
    rows = read(folder, task, split)
    assert len(rows) == 6 * {"train": 12, "validation": 4, "test": 6}[split]
    assert len({parts(row) for row in rows}) == len(rows) or task.startswith("choice") or task == "reverse"
    for row in rows:
        description, connector = entities[row["entity"]]["description"], words[row["connector"]]
        pictured = [owner(picture) for picture in row["images"]]
        assert row["description"] == description and row["task"] == task
        assert row["messages"][1] == {"role": "assistant", "content": [{"type": "text", "text": row["answer"]}]}
        text = re.sub(r"\[e\d+_\d\]", "[]", parts(row))
        if task == "forward":
            assert (text, row["answer"], pictured) == (f"[]{connector}", description, [row["entity"]])
        elif task == "reverse":
            assert text == f"{description} {connector} [], correct or wrong?"
            assert pictured == [row["image_entity"]] and row["correct"] == (row["entity"] == row["image_entity"])
            assert row["answer"] == ("Correct" if row["correct"] else "Wrong")
        else:
            assert len(set(row["option_entities"])) == 4 and row["answer"] == letters[row["answer_index"]]
            assert row["option_entities"][row["answer_index"]] == row["entity"]
            if task == "choice_image":
                options = "\nA. []\nB. []\nC. []\nD. []"
                assert text == f"{description} {connector} which of these pictures?{options}\nAnswer A, B, C or D."
                assert row["images"] == row["options"] and pictured == row["option_entities"]
            else:
                texts = [entities[name]["description"] for name in row["option_entities"]]
                lines = "".join(f"\n{letter}. {option}" for letter, option in zip(letters, texts, strict=True))
                assert text == f"[]{connector} which of these?{lines}\nAnswer A, B, C or D."
                assert pictured == [row["entity"]] and row["options"] == texts


@pytest.mark.parametrize("split", SPLITS)
def test_nothing_but_the_pairing_gives_the_answer_away(folder, split):
    """Each person, and each person's picture, is right and wrong equally often; letters are balanced."""
    rows = read(folder, "reverse", split)
    for field in ("entity", "image_entity"):
        counts = Counter((row[field], row["correct"]) for row in rows)
        assert set(counts.values()) == {len(rows) // 12} and len(counts) == 12
    for task in ("choice_description", "choice_image"):
        rows = read(folder, task, split)
        counts = Counter(row["answer"] for row in rows)
        assert max(counts.values()) - min(counts.values()) <= 1 and len(counts) == 4
        offered = Counter(name for row in rows for name in row["option_entities"] if name != row["entity"])
        assert set(offered.values()) == {len(rows) // 6 * 3}


def test_bad_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"no file .*forward_test.jsonl; JSONL files in that folder: none"):
        read(tmp_path, "forward", "test")
    file = tmp_path / "forward_test.jsonl"
    good = rows_file.make_row("forward", [rows_file.PurePosixPath("a.png"), "is"], "x")
    for text, message in [
        ("", "is empty"),
        ("{", "row 1: not a row"),
        (json.dumps({"id": "1"}), "row 1: not a row: got .* expected an object with images and messages"),
        (json.dumps(good), "row 1: no picture a.png"),
        (json.dumps({**good, "images": []}), "1 image parts in messages, 0 images"),
        (json.dumps({**good, "answer": None}), "expected texts as id, task and answer"),
    ]:
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            read(tmp_path, "forward", "test")


# ---- pictures

still = types.SimpleNamespace(uniform=lambda low, high: (low + high) / 2)
PLAIN = faces.Face("brown", "short", "brown", "fair", "no", "no", "green")


def pixels(face, size: int = 96) -> np.ndarray:
    return np.asarray(faces.draw_face(face, size, still), dtype=np.float32)


def share_of(picture: np.ndarray, colour: tuple[int, int, int]) -> float:
    light = (0.92 + 1.06) / 2
    return (np.abs(picture - np.array(colour) * light).max(-1) < 8).mean()


def test_every_attribute_is_seen():
    """Catches an attribute that is drawn the same for two of its values, or not at all."""
    for name, values in zip(faces.Face._fields, faces.VALUES, strict=True):
        pictures = [pixels(PLAIN._replace(**{name: value})) for value in values]
        for (i, a), (j, b) in itertools.combinations(enumerate(pictures), 2):
            changed = (np.abs(a - b).max(-1) > 40).mean()
            assert changed > 0.004, (name, values[i], values[j], changed)


def test_hair_and_background_have_their_colours():
    """Under every hat there is still hair to see: retention asks for its colour."""
    for hair, style, hat in itertools.product(faces.HAIR, faces.STYLES, faces.HATS):
        picture = pixels(PLAIN._replace(hair=hair, style=style, hat=hat))
        assert share_of(picture, faces.HAIR[hair]) > 0.02, (hair, style, hat)
        assert share_of(picture, faces.BACKGROUNDS["green"]) > 0.2
    for name, colour in faces.BACKGROUNDS.items():
        picture = pixels(PLAIN._replace(background=name))
        assert np.abs(picture[2, 2] - np.array(colour) * 0.99).max() < 3, name


def test_pictures_of_one_person_differ(folder):
    pictures = [np.asarray(Image.open(folder / f"images/e00_{n}.png"), dtype=np.float32) for n in range(1, 8)]
    assert all(picture.shape == (32, 32, 3) for picture in pictures)
    assert min(np.abs(a - b).mean() for a, b in itertools.combinations(pictures, 2)) > 2
    assert len(list((folder / "images").iterdir())) == 6 * 7


class StubPipeline:
    """Stands for a text-to-image pipeline: a plain picture, and what it was asked."""

    def __init__(self):
        self.asked: list[tuple[str, int]] = []

    def to(self, device: str):
        return self

    def set_progress_bar_config(self, disable: bool) -> None:
        assert disable

    def __call__(self, prompt: str, generator):
        self.asked.append((prompt, generator.initial_seed()))
        return types.SimpleNamespace(images=[Image.new("RGBA", (80, 64), "red")])


def test_an_image_model_may_draw_instead(tmp_path, monkeypatch):
    import diffusers

    pipeline = StubPipeline()
    loaded = []
    monkeypatch.setattr(
        diffusers.AutoPipelineForText2Image, "from_pretrained", lambda path, dtype: loaded.append(path) or pipeline
    )
    model = tmp_path / "model"
    model.mkdir()
    (model / "model_index.json").write_text("{}")
    out = run(data, tmp_path / "out", *SMALL, "--image_model", model, "--num_workers", 1)
    assert loaded == [str(model)] and len(pipeline.asked) == len(list((out / "images").iterdir())) == 6 * 7
    people = json.loads((out / "entities.json").read_text())
    for i, person in enumerate(people):
        prompts, seeds = zip(*pipeline.asked[7 * i : 7 * i + 7], strict=True)
        assert len(set(seeds)) == 1 and len(set(prompts)) == 7, "one person: the same noise, another pose each time"
        assert all(f"{person['style']} {person['hair']} hair" in prompt for prompt in prompts)
    assert len({seed for _, seed in pipeline.asked}) == 6
    assert Image.open(out / "images/e00_1.png").size == (32, 32)
    with pytest.raises(ValueError, match=r"image_model .* has no model_index\.json"):
        run(data, tmp_path / "none", *SMALL, "--image_model", tmp_path / "nothing")


def test_workers_share_the_pictures(tmp_path, monkeypatch):
    import diffusers

    monkeypatch.setattr(diffusers.AutoPipelineForText2Image, "from_pretrained", lambda path, dtype: StubPipeline())
    jobs = [faces.Job(tmp_path / f"{n}.png", PLAIN, n) for n in range(5)]
    for rank in range(2):
        faces.paint_share(rank, 2, jobs, 32, 0, "model")
        assert len(list(tmp_path.iterdir())) == (3, 5)[rank]


# ---- retention pools


def test_face_pool(tmp_path):
    out = run(face_pool, tmp_path / "pool", "--num_faces", 50, "--image_size", 32, "--split", 0.6, 0.2, 0.2)
    rows = {split: read(out, "face_retention", split) for split in SPLITS}
    assert [len(rows[split]) for split in SPLITS] == [120, 40, 40]
    pictures = [{row["images"][0] for row in rows[split]} for split in SPLITS]
    assert sum(map(len, pictures)) == len(set.union(*pictures)) == 50
    assert all(row["entity"] is None and row["connector"] is None for some in rows.values() for row in some)
    face = faces.Face("red", "long", "blue", "dark", "round", "no", "navy")
    answers = [answer for _, answer in face_pool.face_questions(face)]
    assert answers == ["no", "yes", "red", "navy"]
    many = faces.choose_pool_faces(2000, seed=0)
    assert 0.45 < np.mean([face.hat == "no" for face in many]) < 0.55
    assert 0.45 < np.mean([face.glasses == "no" for face in many]) < 0.55
    assert Counter(face.hair for face in many).most_common()[-1][1] > 2000 / 6 * 0.8


def test_object_pool_answers_what_is_drawn(tmp_path):
    out = run(object_pool, tmp_path / "pool", "--num_objects", 40, "--image_size", 64)
    rows = {split: read(out, "object_retention", split) for split in SPLITS}
    assert [len(rows[split]) for split in SPLITS] == [96, 12, 12]
    pictures = [{row["images"][0] for row in rows[split]} for split in SPLITS]
    assert sum(map(len, pictures)) == len(set.union(*pictures)) == 40
    for row in itertools.chain(*rows.values()):
        (found,) = shapes.find_shapes(Image.open(out / row["images"][0]))
        question = row["messages"][0]["content"][1]["text"]
        seen = dict(zip(object_pool.QUESTIONS, (found.colour, found.shape, shapes.place_of(found.bbox, (64, 64)))))
        assert row["answer"] == seen[question], (row["id"], found)


def test_shares_of_splits():
    items = random.Random(0).sample(range(100), 10)
    parts = rows_file.share_out(items, (8, 1, 1))
    assert parts == {"train": items[:8], "validation": items[8:9], "test": items[9:]}
    with pytest.raises(ValueError, match="each needs one or more"):
        rows_file.share_out(items[:4], (0.9, 0.05, 0.05))
    with pytest.raises(ValueError, match="take fewer"):
        object_pool.generate(Path("unused"), 841)
