"""What the drift tests read in the source of recipes and of common/: functions, imports, equal lines, settings."""

import ast
import dataclasses
import itertools
import re
from collections import defaultdict
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from helpers import ROOT, load_script
from update_readme import field_helps

LOOP = "# ---- loop: identical in every recipe ----", "# ---- end loop ----"
ROOMS = ("ground", "data", "model", "step", "record", "start", "commands")  # of common/, lowest first
COMMANDS = (
    "common.export",
    "common.zero_to_bf16",
    "common.report",
    "common.make_manifest",
)  # scripts on the ground floor


# ---- functions


def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def functions(file: Path) -> dict[str, ast.FunctionDef]:
    """{name: node} of a file's functions and methods, those inside others too."""
    return {node.name: node for node in ast.walk(parsed(file)) if isinstance(node, ast.FunctionDef)}


def length(node: ast.FunctionDef) -> int:
    """Lines of a function with its decorators."""
    return node.end_lineno - min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) + 1


def branches(function: ast.FunctionDef) -> int:
    """if and elif, conditional expressions, match cases."""
    return sum(isinstance(node, (ast.If, ast.IfExp, ast.match_case)) for node in ast.walk(function))


# ---- equal lines


def blocks_of_lines(file: Path) -> list[list[str]]:
    """The non-blank stripped lines of a train.py, in blocks: imports and the loop are cut out."""
    lines = [line.strip() for line in file.read_text().splitlines()]
    cut = set()
    for node in ast.walk(parsed(file)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            cut |= set(range(node.lineno - 1, node.end_lineno))
    cut |= set(range(lines.index(LOOP[0]), lines.index(LOOP[1]) + 1))
    kept = itertools.groupby(enumerate(lines), key=lambda item: item[0] in cut)
    return [[line for _, line in block if line] for is_cut, block in kept if not is_cut]


def equal_runs(files: Collection[Path], count: int, in_files: int, allowed: Collection[str]) -> list[list[str]]:
    """Runs of `count` lines that stand in so many files. A line that matches one of `allowed` ends a run."""
    where: dict[tuple[str, ...], set[Path]] = defaultdict(set)
    for file in files:
        for block in blocks_of_lines(file):
            for is_allowed, run in itertools.groupby(block, key=lambda line: _matches(line, allowed)):
                lines = list(run)
                for start in range(0 if is_allowed else len(lines) - count + 1):
                    where[tuple(lines[start : start + count])].add(file)
    return [list(run) for run, found in where.items() if len(found) >= in_files]


def _matches(line: str, patterns: Collection[str]) -> bool:
    return any(re.fullmatch(pattern, line) for pattern in patterns)


# ---- settings


def settings_of(recipe: Path) -> dict[str, tuple[str, Any, str]]:
    """{setting: (group, type, help)} of a recipe's Config; its own have the group "cfg"."""
    from common import rules

    cfg = load_script(recipe / "train.py").Config()
    names = {id(group): name for name, group in vars(cfg).items()}
    found = {}
    for group in rules.groups(cfg):
        helps = field_helps(type(group))
        for field in dataclasses.fields(group):
            if field.name in helps:
                found[field.name] = (names.get(id(group), "cfg"), field.type, helps[field.name])
    return found


def read_by_methods(file: Path) -> set[str]:
    """Settings that methods of a file's classes read as self.<setting>: not rules, unless they set something by it."""
    found = set()
    for function in functions_of_classes(file):
        reads = [function] if function.name != "check" else [node for node in function.body if _sets_something(node)]
        nodes = [node for read in reads for node in ast.walk(read) if isinstance(node, ast.Attribute)]
        found |= {node.attr for node in nodes if isinstance(node.value, ast.Name) and node.value.id == "self"}
    return found


def functions_of_classes(file: Path) -> list[ast.FunctionDef]:
    classes = [node for node in parsed(file).body if isinstance(node, ast.ClassDef)]
    return [node for each in classes for node in each.body if isinstance(node, ast.FunctionDef)]


def _sets_something(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and any(isinstance(inner, ast.Assign) for inner in ast.walk(node))


# ---- the rooms of common/


def modules_of_common() -> dict[str, Path]:
    """{"common.data.cache": its file}; packages without code of their own are left out."""
    files = sorted((ROOT / "common").rglob("*.py"))
    return {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in files if file.stem != "__init__"}


def room(module: str) -> str:
    parts = module.split(".")
    return "commands" if module in COMMANDS else "ground" if len(parts) == 2 else parts[1]


def imports(file: Path) -> Iterator[tuple[str, str, str]]:
    """(module, name in it or "", name here) of every import in a file, also inside functions."""
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "", alias.asname or alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module or "", alias.name, alias.asname or alias.name) for alias in node.names)


def imported_modules(file: Path) -> set[str]:
    """Modules that a file imports; `from common.data import cache` is common.data.cache."""
    known = modules_of_common()
    return {f"{module}.{name}" if f"{module}.{name}" in known else module for module, name, _ in imports(file)}


def uses_of_common(file: Path) -> set[tuple[str, str]]:
    """(module of common/, public name) of what a file uses: imported by name, or as an attribute of the module."""
    known, used, modules = modules_of_common(), set(), {}
    for module, name, here in imports(file):
        if f"{module}.{name}" in known:
            modules[here] = f"{module}.{name}"
        elif module in known and name:
            used.add((module, name))
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            used.add((modules[node.value.id], node.attr))
    return used


def definitions(file: Path) -> dict[str, ast.stmt]:
    """{public name: what defines it} of a module's functions, classes and constants."""
    found: dict[str, ast.stmt] = {}
    for node in parsed(file).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = node
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [name for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]
            found |= {name.id: node for name in names}
    return {name: node for name, node in found.items() if not name.startswith("_")}


def used_at_home(file: Path) -> set[str]:
    """Public names of a module that the module itself uses outside what defines them."""
    tree, defined = parsed(file), definitions(file)
    used = set()
    for statement in tree.body:
        names = {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}
        texts = {node.value for node in ast.walk(statement) if isinstance(node, ast.Constant)}  # "Ema | None"
        words = names | {word for text in texts if isinstance(text, str) for word in re.findall(r"\w+", text)[:3]}
        own = {name for name, node in defined.items() if node.lineno == statement.lineno}
        used |= (words & defined.keys()) - own
    return used
