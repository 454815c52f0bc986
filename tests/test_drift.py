"""Recipes are copies: what keeps those of README.md's table, their settings, launch files and documents from drifting
apart, and common/ from growing into a knot. A person's own copy beside them is left alone."""

import ast
import graphlib
import importlib.util
import itertools
import json
import re
import shlex
import sys
import typing
from collections import defaultdict
from pathlib import Path

import pytest
import yaml
from helpers import (
    RECIPES,
    ROOT,
    between,
    copy_of_recipe,
    few_rows,
    load_script,
    promised_recipes,
    read_rows,
    run_command,
    tracked_files,
)
from sources import (
    COMMANDS,
    LOOP,
    ROOMS,
    branches,
    definitions,
    equal_runs,
    functions,
    imported_modules,
    length,
    modules_of_common,
    read_by_methods,
    room,
    settings_of,
    used_at_home,
    uses_of_common,
)
from update_readme import with_table

from common.start.config import parse_recipe

ids = [recipe.name for recipe in RECIPES]
each_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=ids)
configs = [file for recipe in RECIPES for file in sorted((recipe / "configs").rglob("*.yaml"))]
launch_files = [file for recipe in RECIPES for file in sorted((recipe / "accelerate").rglob("*.yaml"))]

TRAIN_LINES = {
    "qwenimage_fulltune": 420,
    "flux2klein_fulltune": 480,
    "qwenimage_edit": 480,
    "qwenimage21_fulltune": 500,
    "kolors_spatial_adapter": 520,
    "qwen3vl_qlora": 500,
}
TRAIN_LINES_TOGETHER = 2820
OWN_IN_THREE_RECIPES = {
    "pretrained_model_name_or_path": "the default differs by model",
    "benchmark_prompt_tokens": "the default differs by model, and so does what a prompt is",
}
EQUAL_LINES = {
    r"\w+: settings\.Flat\[.*": "the groups of a Config",
    r"def (validate|held_out_errors|draw_pictures)\(.*": "what the loop and validation call has one form",
    r"class Models:|transformer = adapters\.load\(.*|models = Models\(": "what main puts together, beside the loop",
}
EQUAL_FUNCTIONS = {
    "make": "of make_tiny.py: it names what a tiny base is made of",
    "validate": "a reader sees what is measured and drawn, beside what it calls",
    "held_out_errors": "likewise",
}
IN_TWO_RECIPES = {
    "common.start.dry_run.show_captioned": "captions that are the whole prompt; those of edits and boxes have more",
}
CHOICES_DIFFER = {
    "mixed_precision": "fp16 is for adapters alone",
    "optimizer": "sharded and bf16 weights are for full tuning alone",
}


def name_of(file: Path) -> str:
    return "/".join(file.relative_to(ROOT).parts[1:])


def train_files() -> list[Path]:
    return [recipe / "train.py" for recipe in RECIPES]


# ---- which recipes


def test_there_are_recipes():
    """Catches tests that pass because they found nothing, and a recipe that README.md's table does not name."""
    assert len(RECIPES) >= 6 and configs and launch_files
    assert {recipe.name for recipe in RECIPES} == TRAIN_LINES.keys()
    assert all((recipe / "train.py").is_file() for recipe in RECIPES)


def test_a_copy_beside_the_recipes_is_free():
    """Catches tests that hold a person's own copy to what recipes promise: another loop, another flag and a used-up
    budget of lines fail nothing."""
    with copy_of_recipe(RECIPES[0], "drift") as copy:
        text = (copy / "train.py").read_text()
        text = text.replace("        meter.add(measured)\n", "        meter.add(measured)\n            print(step)\n")
        field = '    my_own_flag: int = 3\n    """a flag of the copy"""\n    learning_rate: str = ""\n    """mine"""\n'
        text = text.replace("class Config:\n", f'class Config:\n    """Mine."""\n\n{field}', 1) + "# mine\n" * 1000
        (copy / "train.py").write_text(text)
        (copy / "run.sh").write_text("#!/usr/bin/env bash\n")
        (copy / "configs/mine.yaml").write_text("nonsense: true\n")
        (copy / "accelerate/mine.yaml").write_text("nonsense: true\n")
        assert "my_own_flag" in text and "print(step)" in text
        assert promised_recipes() == RECIPES and copy not in promised_recipes()
        spec = importlib.util.spec_from_file_location("test_drift_beside_a_copy", __file__)
        again = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(again)  # collects anew, with the copy there
        assert (again.RECIPES, again.configs, again.launch_files) == (RECIPES, configs, launch_files)
        again.test_the_loop_is_the_same_text_everywhere()
        again.test_settings_mean_the_same_everywhere()
        again.test_budgets_of_train_py()
        again.test_settings_are_declared_once()


# ---- one text


def test_the_loop_is_the_same_text_everywhere():
    """Catches a fix of the training loop that was made in one recipe only."""
    loops = {file.parent.name: between(file.read_text(), *LOOP) for file in train_files()}
    first = loops[ids[0]]
    assert all(loop == first for loop in loops.values()), [name for name, loop in loops.items() if loop != first]
    for line in (
        "while step < cfg.batch.max_train_steps",
        "compute_loss(",
        "accelerator.backward(loss)",
        "checkpoint.save_if_due(",
        "validate(",
    ):
        assert line in first


@each_recipe
def test_run_sh_is_the_same_text_everywhere(recipe):
    """Catches a launcher that was mended in one recipe only."""
    assert (recipe / "run.sh").read_text() == (RECIPES[0] / "run.sh").read_text()


def test_no_eight_lines_stand_in_three_recipes():
    """Catches what belongs in common/ and was copied: eight lines in a row that three train.py share, outside the
    imports and the loop. EQUAL_LINES says which lines may, and why."""
    runs = equal_runs(train_files(), 8, 3, EQUAL_LINES)
    assert not runs, "\n\n".join("\n".join(run) for run in runs)
    for pattern in EQUAL_LINES:
        rest = EQUAL_LINES.keys() - {pattern}
        assert equal_runs(train_files(), 8, 3, rest), f"{pattern} need not be allowed any more"


def test_no_long_function_stands_in_three_recipes():
    """Catches the same in other files: a function of eight lines or more that three recipes have."""
    where = defaultdict(set)
    for recipe in RECIPES:
        for file in recipe.glob("*.py"):
            for node in functions(file).values():
                if length(node) >= 8 and node.name != "main":
                    where[ast.unparse(node)].add(recipe.name)
    found = {re.findall(r"def (\w+)", text)[0]: names for text, names in where.items() if len(names) >= 3}
    assert found.keys() <= EQUAL_FUNCTIONS.keys(), found
    assert found.keys() == EQUAL_FUNCTIONS.keys(), "some need not be allowed any more"


# ---- budgets


def test_budgets_of_train_py():
    """Catches a train.py that cannot be read in one sitting any more."""
    lines = {file.parent.name: len(file.read_text().splitlines()) for file in train_files()}
    over = {name: n for name, n in lines.items() if n > TRAIN_LINES[name]}
    assert not over and sum(lines.values()) <= TRAIN_LINES_TOGETHER, lines


@each_recipe
def test_budgets_of_functions(recipe):
    """Catches a function of a train.py that does too much, and a main that is no table of contents any more."""
    found = functions(recipe / "train.py")
    over = {name: length(node) for name, node in found.items() if name != "main" and length(node) > 45}
    assert not over, over
    assert length(found["main"]) <= 75, length(found["main"])
    assert branches(found["main"]) <= 12, branches(found["main"])


@each_recipe
def test_main_mentions_modes_once(recipe):
    """Catches a benchmark, a plan or a dry run that is asked about again and again on the way through main."""
    text = (recipe / "train.py").read_text()
    main = ast.get_source_segment(text, functions(recipe / "train.py")["main"])
    for mode in (r"\bbenchmark\b", r"\bplan\b(?!\.)", r"\bdry_run\b(?!\.)"):
        assert len(re.findall(mode, main)) <= 1, mode


def test_budgets_of_other_files():
    """Catches a file of common/ that holds two subjects, and a make_tiny.py that trains."""
    files = dict.fromkeys(modules_of_common().values(), 300)
    files |= {recipe / "make_tiny.py": 250 for recipe in RECIPES}
    lines = {file: len(file.read_text().splitlines()) for file in files}
    over = {name_of(file): n for file, n in lines.items() if n > files[file]}
    assert not over, over


# ---- imports


@each_recipe
def test_no_recipe_imports_another(recipe):
    """Catches a recipe that breaks when another is changed or deleted."""
    for file in recipe.rglob("*.py"):
        for module in imported_modules(file):
            assert module.split(".")[0] not in {"recipes", *ids}, f"{file.name} imports {module}"


def test_modules_beside_train_py_have_names_of_their_own():
    """Catches `import rows` that finds another recipe's rows, where two are used in one process (as here)."""
    everywhere = {"train", "sample", "make_tiny", "evaluate"}  # scripts that nothing imports
    where = defaultdict(set)
    for recipe in RECIPES:
        for file in recipe.glob("*.py"):
            where[file.stem].add(recipe.name)
        imported = set().union(*map(imported_modules, recipe.glob("*.py")))
        assert not imported & everywhere, imported & everywhere
    assert not {stem: names for stem, names in where.items() if len(names) > 1 and stem not in everywhere}


def test_common_knows_no_model():
    """Catches a shared file that imports a model library, or a recipe, or asks which model it is."""
    for module, file in modules_of_common().items():
        for name in imported_modules(file):
            allowed = {"peft"} if module == "common.model.adapters" else set()
            assert name.split(".")[0] not in {"diffusers", "transformers", "peft", "recipes"} - allowed, (module, name)
        code = re.sub(r'""".*?"""|#[^\n]*', "", file.read_text(), flags=re.DOTALL)
        assert not re.search("qwen|flux|kolors", code, re.IGNORECASE), file


def test_arrows_between_rooms_go_one_way():
    """Catches a lower room of common/ that imports a higher one, a room without a place, and modules in a circle."""
    modules, graph = modules_of_common(), {}
    for module, file in modules.items():
        assert room(module) in ROOMS, f"{module} is in no room of {ROOMS}"
        graph[module] = {name for name in imported_modules(file) if name.split(".")[0] == "common"}
        for name in graph[module]:
            assert name in modules, f"{module} imports {name}, expected a module of common/"
            assert ROOMS.index(room(name)) <= ROOMS.index(room(module)), f"{module} imports {name}, which is higher"
    order = list(graphlib.TopologicalSorter(graph).static_order())  # CycleError names a circle
    assert set(order) == modules.keys()


def test_every_public_name_of_common_is_shared():
    """Catches what belongs to one recipe, or to nobody: a public name is used by three recipes, or by common/ itself
    outside of what defines it."""
    modules, used = modules_of_common(), defaultdict(set)
    for recipe in RECIPES:
        for use in set().union(*map(uses_of_common, recipe.glob("*.py"))):
            used[use].add(recipe.name)
    for module, file in modules.items():
        for use in uses_of_common(file):
            used[use] |= {"common"} if use[0] != module else set()
    alone = {}
    for module, file in modules.items():
        for name in definitions(file).keys() - used_at_home(file):
            names = used[module, name]
            if "common" not in names and len(names) < 3:
                alone[f"{module}.{name}"] = sorted(names)
    assert alone.keys() <= IN_TWO_RECIPES.keys(), {name: alone[name] for name in alone.keys() - IN_TWO_RECIPES.keys()}
    assert alone.keys() == IN_TWO_RECIPES.keys(), "some need not be allowed any more"
    assert all(len(names) == 2 for names in alone.values()), alone


@pytest.mark.parametrize("module", COMMANDS)
def test_commands_run_by_their_path(module):
    """Catches a command that is found only from the repository's root, or as a module."""
    done = run_command([sys.executable, modules_of_common()[module], "--help"]).check()  # from another folder
    assert f"usage: {modules_of_common()[module].name}" in done.output


# ---- settings


@each_recipe
def test_every_setting_is_read(recipe):
    """Catches dead settings: a flag that a user sets and nothing reads."""
    files = [*recipe.glob("*.py"), *modules_of_common().values()]
    text = "\n".join(file.read_text() for file in files)
    common = (modules_of_common()[f"common.{name}"] for name in ("settings", "image_settings"))
    in_methods = set().union(*map(read_by_methods, (recipe / "train.py", *common)))
    run_sh = (recipe / "run.sh").read_text()  # reads `launch:` from the YAML
    dead = []
    for name, (group, _, _) in settings_of(recipe).items():
        if not (name in in_methods or re.search(rf"\b{group}\.{name}\b(?! = )", text) or f"^{name}:" in run_sh):
            dead.append(name)
    assert not dead, f"nothing reads {dead}"


def test_settings_mean_the_same_everywhere():
    """Catches a flag of the same name with another type or help in another recipe. Of CHOICES_DIFFER, some have fewer
    choices."""
    meanings = defaultdict(lambda: defaultdict(list))
    for recipe in RECIPES:
        for name, (_, kind, text) in settings_of(recipe).items():
            meanings[name][kind, text].append(recipe.name)
    different = {name: dict(found) for name, found in meanings.items() if len(found) > 1}
    assert different.keys() <= CHOICES_DIFFER.keys(), {n: m for n, m in different.items() if n not in CHOICES_DIFFER}
    for name, found in different.items():
        choices = sorted((set(typing.get_args(kind)) for kind, _ in found), key=len)
        assert choices[0] and all(few <= many for few, many in itertools.pairwise(choices)), (name, choices)


def test_settings_are_declared_once():
    """Catches a setting that three recipes declare themselves: it belongs in common/settings.py."""
    where = defaultdict(list)
    for recipe in RECIPES:
        for name, (group, _, _) in settings_of(recipe).items():
            if group == "cfg":
                where[name].append(recipe.name)
    repeated = {name: recipes for name, recipes in where.items() if len(recipes) >= 3}
    assert repeated.keys() <= OWN_IN_THREE_RECIPES.keys(), repeated
    assert repeated.keys() == OWN_IN_THREE_RECIPES.keys(), "some need not be allowed any more"


@each_recipe
def test_settings_have_the_usual_names(recipe):
    """Catches a recipe that renames what every recipe has."""
    usual = """pretrained_model_name_or_path train_data_dir train_data_meta output_dir seed train_batch_size
    gradient_accumulation_steps gradient_checkpointing max_train_steps num_train_epochs learning_rate lr_scheduler
    lr_warmup_steps adam_beta1 adam_beta2 adam_weight_decay adam_epsilon max_grad_norm mixed_precision
    checkpointing_steps checkpoints_total_limit resume_from_checkpoint validation_steps report_to
    tracker_project_name dataloader_num_workers""".split()
    assert not set(usual) - settings_of(recipe).keys()


# ---- configs, launch files, other files


@pytest.mark.parametrize("file", configs, ids=name_of)
def test_every_config_parses(file):
    """Catches a YAML with a key that its recipe no longer has, or a value that its rules refuse."""
    recipe = next(folder for folder in file.parents if folder in RECIPES)
    train = load_script(recipe / "train.py")
    second_names = vars(train).get("SECOND_NAMES", {})  # of grouped YAML files
    cfg = parse_recipe(train.Config, ["--config", str(file), "--train_data_dir", "given"], second_names)
    assert (recipe / f"accelerate/{cfg.run.launch}.yaml").is_file(), f"launch: {cfg.run.launch}"
    header = file.read_text().splitlines()[0]
    assert header.startswith("# "), "a config begins with what it is for, and on which hardware"


SHARDING = """\
# common/model/sharding.py reads the FSDP_* variables made of this file and calls fully_shard itself, on GPUs and CPUs
# alike; the blocks are those that the model's class names as repeated.
"""


@pytest.mark.parametrize("file", launch_files, ids=name_of)
def test_every_launch_file_parses(file):
    """Catches a launch file that names a file that is not there, and one that names blocks: those are the model's."""
    recipe, text = file.parents[1], file.read_text()
    content = yaml.safe_load(text)
    assert content["distributed_type"] in ("NO", "MULTI_GPU", "FSDP", "DEEPSPEED") and content["use_cpu"] is False
    assert text.startswith("# For: "), "a launch file begins with what it is for"
    if content["distributed_type"] == "DEEPSPEED":
        assert (recipe / content["deepspeed_config"]["deepspeed_config_file"]).is_file()
    if content["distributed_type"] == "FSDP":
        assert "fsdp_transformer_layer_cls_to_wrap" not in text
        assert SHARDING in (recipe / "accelerate/fsdp2.yaml").read_text()
        assert content["fsdp_config"]["fsdp_version"] == 2


@pytest.mark.parametrize(
    "recipe",
    [recipe for recipe in RECIPES if (recipe / "accelerate/fsdp2.yaml").is_file()],
    ids=lambda path: path.name,
)
def test_the_model_names_its_blocks(recipe):
    """Catches a model whose class does not say which blocks repeat: fsdp2 would gather it as a whole."""
    import diffusers

    (name,) = re.findall(r"loading\.empty_model\(\s*(\w+)", (recipe / "train.py").read_text())
    model = getattr(diffusers, name)
    source = Path(importlib.util.find_spec(model.__module__).origin).read_text()
    assert model._repeated_blocks and all(f"class {block}(" in source for block in model._repeated_blocks)


@each_recipe
def test_every_json_parses(recipe):
    """Catches DeepSpeed files that win over the recipe's settings: what the config decides must be "auto" there. And
    a benchmark without the model's configuration."""
    files = list(recipe.rglob("*.json"))
    assert any(file.parent.name == "full_size" for file in files)
    for file in files:
        content = json.loads(file.read_text())
        assert content and isinstance(content, dict), file
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
READMES += [ROOT / f"{name}.md" for name in ("CONTRIBUTING", "docs/running", "docs/platforms")]


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


def second_names(recipe: Path) -> set[str]:
    """Of flags."""
    text = "\n".join(file.read_text() for file in recipe.glob("*.py"))
    return set().union(*map(ast.literal_eval, re.findall(r"^SECOND_NAMES = (\{.*?\})", text, re.M | re.S)))


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
            known = {*settings_of(recipe), "help", "list"}
        elif script.endswith("train.py"):
            known = {*settings_of(recipe), *second_names(recipe), "help", "config"}
        else:
            text = (ROOT / script).read_text()
            text += (ROOT / "common/start/drawing.py").read_text() if "drawing.add_flags" in text else ""
            known = set(re.findall(r'add_argument\(\s*"--(\w+)"', text))
        flags = {re.sub("^no[-_]", "", word[2:].split("=")[0]) for word in given if word.startswith("--")}
        assert flags <= known, f"{flags - known} in: {command}"
        for launch in re.findall(r"\bLAUNCH=(\w+)", command):
            assert (recipe / f"accelerate/{launch}.yaml").is_file(), command


# ---- copies


@pytest.mark.slow
@each_recipe
def test_a_copied_recipe_runs(recipe, tmp_path):
    """Catches a recipe that runs in its own folder only: a copy of it makes its tiny base, trains and exports."""
    with copy_of_recipe(recipe, recipe.name) as copy:
        outputs = ROOT / "outputs" / copy.name
        flags = ["--max_train_steps", 2, "--validation_steps", 0, "--checkpointing_steps", 2]
        done = run_command(["bash", copy / "run.sh", "tiny", *flags, *few_rows(recipe, tmp_path)]).check()
        assert len(read_rows(outputs / "tiny")) == 2, done.output
        assert (outputs / "tiny/export").is_dir() or (outputs / "tiny/final").is_dir(), done.output  # or adapters
        assert (outputs / "tiny/checkpoint-2").is_dir() and str(recipe) + "/" not in done.output
