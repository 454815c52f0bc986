"""Settings and invocations that cannot be meant: each ends in one sentence and with exit code 2, and none keeps the
user waiting.

They are in hostile_settings.jsonl, with what must be said of each: flags, for all recipes that have them; a YAML file;
and with "main" what is found out only when main looks at folders and files.
"""

import json
import os
import shlex
import shutil
import signal
from pathlib import Path

import pytest
from helpers import RECIPES, ROOT, load_script, make_tiny_base, run_main
from sources import settings_of

from common.record import integrity
from common.start import plan
from common.start.config import parse_recipe

ENTRIES = [json.loads(line) for line in (ROOT / "tests/hostile_settings.jsonl").read_text().splitlines()]


def title(entry: dict) -> str:
    return " ".join([entry["flags"], repr(entry.get("yaml", "")), *entry.get("damage", [])])[:60]


def those(main: bool) -> pytest.MarkDecorator:
    entries = [entry for entry in ENTRIES if entry.get("main", False) == main]
    return pytest.mark.parametrize("entry", entries, ids=map(title, entries))


SETTINGS = {recipe: settings_of(recipe).keys() for recipe in RECIPES}


def recipes_of(entry: dict) -> list[Path]:
    """Those that have all flags of an entry, of which main is asked once, unless the entry says which."""
    names = {word[2:].removeprefix("no-") for word in shlex.split(entry["flags"]) if word.startswith("--")}
    have = [recipe for recipe in RECIPES if names - {"no_such_flag", "config"} <= SETTINGS[recipe]]
    if entry.get("recipe", "all") != "all":
        return [recipe for recipe in RECIPES if recipe.name == entry["recipe"]]
    return have if "recipe" in entry or "main" not in entry else have[-1:]


@pytest.fixture(autouse=True)
def in_time():
    """What does not answer within a minute is a mistake too."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("no answer within 60 s"))
    signal.alarm(60)
    yield
    signal.alarm(0)


def test_the_corpus_is_large():
    """Catches entries that are lost, stand twice, or that no recipe has."""
    assert len(ENTRIES) >= 250 and all(recipes_of(entry) for entry in ENTRIES)
    assert len({json.dumps(entry) for entry in ENTRIES}) == len(ENTRIES)


@those(main=False)
def test_a_setting_is_refused_by_the_parser(entry, tmp_path, capfd):
    """Catches nan, negative and endless numbers that train nonsense or nothing, and a traceback where a sentence
    should be."""
    flags = shlex.split(entry["flags"])
    if "yaml" in entry:
        (tmp_path / "given.yaml").write_text(entry["yaml"])
        flags = ["--config", str(tmp_path / "given.yaml")]
    for recipe in recipes_of(entry):
        config = load_script(recipe / "train.py").Config
        given = [] if "train_data_dir" in entry["said"] else ["--train_data_dir", "given"]
        with pytest.raises((ValueError, SystemExit)) as ended:
            parse_recipe(config, [*given, *flags])
        said = "".join(capfd.readouterr())
        if isinstance(ended.value, SystemExit):
            assert ended.value.code == 2, recipe.name
        else:
            said = str(ended.value)
            assert "\n" not in said and len(said) < 500, said
        assert entry["said"] in " ".join(said.replace("│", " ").split()), (recipe.name, said)


@pytest.mark.parametrize("recipe", RECIPES, ids=[recipe.name for recipe in RECIPES])
def test_another_optimizer_on_resume_is_refused(recipe, tmp_path, capfd):
    """Catches a checkpoint whose optimizer's state is put into another one, or ends in a traceback when all is
    loaded."""
    saved = tmp_path / "checkpoint-5"
    saved.mkdir()
    (saved / "trainer_state.json").write_text(json.dumps({"step": 5, "config": {"optimizer": "adafactor"}}))
    integrity.seal(saved)
    make_tiny_base(recipe)
    flags = ["--config", recipe / "configs/tiny.yaml", "--output_dir", tmp_path, "--optimizer", "adamw"]
    with pytest.raises(SystemExit) as ended, plan.explained_errors():
        run_main(load_script(recipe / "train.py"), [*flags, "--resume_from_checkpoint", "latest"])
    said = capfd.readouterr().err
    assert ended.value.code == 2 and "Traceback" not in said
    assert f"error: {saved} holds the state of optimizer adafactor, and this run has adamw: resume with" in said


def damaged(model: Path, copy: Path, what: str, name: str) -> Path:
    """A copy of a model's folder in which one file, or a part, is not as it was written."""
    shutil.copytree(model, copy, copy_function=os.symlink)
    path = copy / name
    if path.is_dir():
        path = path if what == "remove" else path / "diffusion_pytorch_model.safetensors"
    content = path.read_bytes() if path.is_file() else b""
    if what == "remove" and path.is_dir():
        shutil.rmtree(path)
        return copy
    path.unlink()
    if what == "truncate":
        path.write_bytes(content[: len(content) // 2])
    elif what == "zeros":
        path.write_bytes(bytes(len(content)))
    elif what == "index":
        files = [f"diffusion_pytorch_model-0000{number}-of-00002.safetensors" for number in (1, 2)]
        (path.parent / files[0]).write_bytes(content)
        index = {"metadata": {}, "weight_map": {"a": files[0], "b": files[1]}}
        (path.parent / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return copy


@those(main=True)
def test_a_mistake_is_found_before_anything_is_loaded(entry, tmp_path, capfd, monkeypatch):
    """Catches folders that are files, models of which a part is missing or cut short and data that is not there, found
    out late or with a traceback; a model is not asked from the hub before the data is looked at."""
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("the hub was asked"))
    (tmp_path / "file").write_text("a file")
    (tmp_path / "empty").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    for suffix in (".json", ".txt", ".parquet"):
        (tmp_path / f"bad{suffix}").write_bytes(b'{"text": "\xff"}')
    places = {name: tmp_path / name for name in ("file", "empty", "loop", "bad")} | {"tmp": tmp_path}
    for recipe in recipes_of(entry):
        make_tiny_base(recipe)
        flags = ["--output_dir", tmp_path / "out", *shlex.split(entry["flags"].format(**places))]
        if "damage" in entry:
            model = ROOT / "outputs" / recipe.name / "tiny_base/model"
            flags += ["--pretrained_model_name_or_path", damaged(model, tmp_path / "model", *entry["damage"])]
        with pytest.raises(SystemExit) as ended, plan.explained_errors():
            run_main(load_script(recipe / "train.py"), ["--config", recipe / "configs/tiny.yaml", *flags])
        said = capfd.readouterr().err
        lines = [line for line in said.splitlines() if line.startswith("error: ")]
        assert ended.value.code == 2 and len(lines) == 1 and "Traceback" not in said, (recipe.name, said)
        assert entry["said"].format(**places) in lines[0] and len(lines[0]) < 1000, (recipe.name, lines[0])
