"""Recipes are copies: what keeps them, their settings, launch files and documents from drifting apart."""

import ast
import itertools
import json
import re
import shlex
import shutil
from collections import defaultdict
from pathlib import Path

import pytest
import yaml
from helpers import RECIPES, ROOT, between, load_script, read_rows, run_command, tracked_files
from update_readme import with_table

from common.config import parse_config

ids = [recipe.name for recipe in RECIPES]
each_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=ids)
configs = [file for recipe in RECIPES for file in sorted((recipe / "configs").rglob("*.yaml"))]
launch_files = [file for recipe in RECIPES for file in sorted((recipe / "accelerate").rglob("*.yaml"))]


def name_of(file: Path) -> str:
    return "/".join(file.relative_to(ROOT).parts[1:])


def config_fields(recipe: Path) -> dict[str, tuple[str, str]]:
    """{field: (type, help)} of a recipe's Config, read from its source."""
    tree = ast.parse((recipe / "train.py").read_text())
    (body,) = [node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Config"]
    pairs = [(node, after) for node, after in itertools.pairwise(body) if isinstance(node, ast.AnnAssign)]
    return {a.target.id: (ast.unparse(a.annotation), " ".join(b.value.value.split())) for a, b in pairs}


def test_there_are_recipes():
    """Catches tests that pass because they found nothing."""
    assert RECIPES and configs and launch_files


def test_the_loop_is_the_same_text_everywhere():
    """Catches a fix of the training loop that was made in one recipe only."""
    markers = "# ---- loop: identical in every recipe ----", "# ---- end loop ----"
    loops = {recipe.name: between((recipe / "train.py").read_text(), *markers) for recipe in RECIPES}
    first = loops[ids[0]]
    assert all(loop == first for loop in loops.values()), [name for name, loop in loops.items() if loop != first]
    for line in (
        "while step < cfg.max_train_steps",
        "compute_loss(",
        "accelerator.backward(loss)",
        "save(",
        "validate(",
    ):
        assert line in first


@each_recipe
def test_run_sh_is_the_same_text_everywhere(recipe):
    """Catches a launcher that was mended in one recipe only."""
    assert (recipe / "run.sh").read_text() == (RECIPES[0] / "run.sh").read_text()


@each_recipe
def test_no_recipe_imports_another(recipe):
    """Catches a recipe that breaks when another is changed or deleted."""
    for file in recipe.rglob("*.py"):
        for module in imported(file):
            assert module.split(".")[0] not in {"recipes", *ids}, f"{file.name} imports {module}"


def test_common_knows_no_model():
    """Catches a shared file that imports a model library, or a recipe, or asks which model it is."""
    for file in (ROOT / "common").glob("*.py"):
        for module in imported(file):
            assert module.split(".")[0] not in {"diffusers", "transformers", "peft", "recipes"}, (file.name, module)
        assert not re.search(
            "qwen|flux|kolors", re.sub(r'""".*?"""|#.*', "", file.read_text(), flags=re.DOTALL), re.I
        ), file


def imported(file: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module or "")
    return modules


@each_recipe
def test_every_setting_is_read(recipe):
    """Catches dead settings: a flag that a user sets and nothing reads."""
    files = [*recipe.glob("*.py"), *(ROOT / "common").glob("*.py")]
    text = "\n".join(file.read_text() for file in files)
    run_sh = (recipe / "run.sh").read_text()  # reads `launch:` from the YAML
    names = config_fields(recipe)
    dead = [name for name in names if not re.search(rf"\bcfg\.{name}\b", text) and f"^{name}:" not in run_sh]
    assert not dead, f"nothing reads {dead}"


def test_settings_mean_the_same_everywhere():
    """Catches a flag of the same name with another type or help in another recipe."""
    meanings = defaultdict(lambda: defaultdict(list))
    for recipe in RECIPES:
        for name, meaning in config_fields(recipe).items():
            meanings[name][meaning].append(recipe.name)
    different = {name: dict(found) for name, found in meanings.items() if len(found) > 1}
    assert not different, different


@each_recipe
def test_settings_have_the_usual_names(recipe):
    """Catches a recipe that renames what every recipe has."""
    usual = """pretrained_model_name_or_path train_data_dir train_data_meta output_dir seed train_batch_size
    gradient_accumulation_steps gradient_checkpointing max_train_steps num_train_epochs learning_rate lr_scheduler
    lr_warmup_steps adam_beta1 adam_beta2 adam_weight_decay adam_epsilon max_grad_norm mixed_precision
    checkpointing_steps checkpoints_total_limit resume_from_checkpoint validation_steps report_to
    tracker_project_name dataloader_num_workers""".split()
    assert not set(usual) - config_fields(recipe).keys()


@pytest.mark.parametrize("file", configs, ids=name_of)
def test_every_config_parses(file):
    """Catches a YAML with a key that its recipe no longer has, or a value that its rules refuse."""
    recipe = next(folder for folder in file.parents if folder in RECIPES)
    cfg = parse_config(load_script(recipe / "train.py").Config, ["--config", str(file), "--train_data_dir", "given"])
    assert (recipe / f"accelerate/{cfg.launch}.yaml").is_file(), f"launch: {cfg.launch}"
    header = file.read_text().splitlines()[0]
    assert header.startswith("# "), "a config begins with what it is for, and on which hardware"


@pytest.mark.parametrize("file", launch_files, ids=name_of)
def test_every_launch_file_parses(file):
    """Catches a launch file that names a file or a block class that is not there."""
    recipe = file.parents[1]
    content = yaml.safe_load(file.read_text())
    assert content["distributed_type"] in ("NO", "MULTI_GPU", "FSDP", "DEEPSPEED") and content["use_cpu"] is False
    assert file.read_text().startswith("# For: "), "a launch file begins with what it is for"
    if content["distributed_type"] == "DEEPSPEED":
        assert (recipe / content["deepspeed_config"]["deepspeed_config_file"]).is_file()
    if content["distributed_type"] == "FSDP":
        block = content["fsdp_config"]["fsdp_transformer_layer_cls_to_wrap"]
        import diffusers
        import transformers

        sources = [Path(module.__file__).parent / "models" for module in (diffusers, transformers)]
        text = "".join(path.read_text() for root in sources for path in root.rglob("*.py"))
        assert all(f"class {name}(" in text for name in block.split(",")), block


@each_recipe
def test_every_json_parses(recipe):
    """Catches DeepSpeed files that win over the recipe's settings: what the config decides must be "auto" there."""
    for file in recipe.rglob("*.json"):
        content = json.loads(file.read_text())
        if file.parent.name == "deepspeed":
            for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"):
                assert content[key] == "auto", (file.name, key)
            assert content["bf16"]["enabled"] == "auto" and "optimizer" not in content and "scheduler" not in content
            used = [other.read_text() for other in (recipe / "accelerate").glob("*.yaml")]
            assert any(f"deepspeed/{file.name}" in text for text in used), f"no launch file uses {file.name}"


@each_recipe
def test_no_file_knows_its_folders_name(recipe):
    """Catches a recipe that does not run as a copy, or whose copy writes into the original's folders."""
    named = []
    for file in tracked_files():
        if file.is_relative_to(recipe) and file.suffix != ".safetensors" and file.name != "README.md":
            lines = enumerate(file.read_text().splitlines(), 1)
            word = rf"(?<!\w){recipe.name}(?!\w)"  # not a part of a longer name, of a module of diffusers for one
            named += [f"{file.name}:{number}: {line}" for number, line in lines if re.search(word, line)]
    assert not named, named


def test_no_machine_paths():
    """Catches paths of the machine that something was written on."""
    pattern = re.compile("(?<![A-Za-z0-9_.~}-])/" + "(work|root|home/[a-z]+|Users|mnt|workspace)" + "/")
    for file in tracked_files():
        if file.suffix not in (".safetensors", ".png"):
            found = [line for line in file.read_text().splitlines() if pattern.search(line)]
            assert not found, (file, found)


# ---- documents


@each_recipe
def test_readme_has_the_table_of_settings(recipe):
    """Catches a README whose table of settings is not what the recipe has; `python tests/update_readme.py` mends
    it."""
    assert (recipe / "README.md").read_text() == with_table(recipe)


READMES = [ROOT / "README.md", *(recipe / "README.md" for recipe in RECIPES)]


@pytest.mark.parametrize("readme", READMES, ids=lambda file: str(file.relative_to(ROOT)))
def test_readme_commands_name_what_exists(readme):
    """Catches commands with paths, configs, launch files or flags that are not there."""
    text = readme.read_text()
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    commands = [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]
    assert commands
    for command in commands:
        check_command(command.split("  #")[0])
    for path in re.findall(r"`((?:recipes|common|tests)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path


def check_command(command: str) -> None:
    words = shlex.split(command, comments=True)
    copies = {word for before, word in itertools.pairwise(words) if before.startswith("recipes/") and "cp" in words}
    paths = [word for word in words if re.match(r"(recipes|common|tests|\.ci)/|setup\.sh$", word)]
    for path in paths:
        assert (ROOT / path).exists() or any(path.startswith(copy) for copy in copies), f"{path} in: {command}"
    for script in (path for path in paths if path.endswith(("run.sh", ".py")) and path.startswith("recipes/")):
        recipe = ROOT / Path(script).parent
        if not recipe.is_dir():
            continue
        given = words[words.index(script) + 1 :]
        if script.endswith("run.sh"):
            if given and not given[0].startswith("-") and given[0] not in ("&&", ";"):
                assert (recipe / f"configs/{given[0]}.yaml").is_file(), f"config {given[0]} in: {command}"
            known = {*config_fields(recipe), "help"}
        elif script.endswith("train.py"):
            known = {*config_fields(recipe), "help", "config"}
        else:
            known = set(re.findall(r'add_argument\(\s*"--(\w+)"', (ROOT / script).read_text()))
        flags = {re.sub("^no[-_]", "", word[2:].split("=")[0]) for word in given if word.startswith("--")}
        assert flags <= known, f"{flags - known} in: {command}"
        for launch in re.findall(r"\bLAUNCH=(\w+)", command):
            assert (recipe / f"accelerate/{launch}.yaml").is_file(), command


# ---- copies


@pytest.mark.slow
@each_recipe
def test_a_copied_recipe_runs(recipe, tmp_path):
    """Catches a recipe that runs in its own folder only: a copy of it makes its tiny base, trains and exports."""
    copy = recipe.with_name(f"copied_by_a_test_{recipe.name}")
    outputs = ROOT / "outputs" / copy.name
    shutil.rmtree(copy, ignore_errors=True)
    try:
        shutil.copytree(recipe, copy, ignore=shutil.ignore_patterns("__pycache__"))
        flags = ["--max_train_steps", 2, "--validation_steps", 0, "--checkpointing_steps", 2]
        done = run_command(["bash", copy / "run.sh", "tiny", *flags]).check()
        assert len(read_rows(outputs / "tiny")) == 2, done.output
        assert (outputs / "tiny/export").is_dir() or (outputs / "tiny/final").is_dir(), done.output  # or adapters
        assert (outputs / "tiny/checkpoint-2").is_dir() and str(recipe) + "/" not in done.output
    finally:
        shutil.rmtree(copy, ignore_errors=True)
        shutil.rmtree(outputs, ignore_errors=True)
