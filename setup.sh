#!/usr/bin/env bash
# setup.sh [EXTRA ...]   finds or makes a Python that has what pyproject.toml asks for, and prints its path.
#
#   python=$(bash setup.sh)         what every recipe's run.sh does; less than a second when nothing is to do
#   python=$(bash setup.sh test)    with the packages of pyproject.toml's extra "test"
#
# The first of these that has everything is taken as it is: the active environment (virtualenv, conda), python3, .venv.
# If none has: what is missing is added to the active environment and nothing in it is changed; if it holds too old
# a version or is no virtual one, it is left alone and .venv is made with the versions of constraints.txt.
# Messages go to stderr, the path alone to stdout. Nothing but packages is downloaded.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
extras=("$@")
say() { echo "setup: $*" >&2; }
die() { say "$*"; exit 1; }

# check PYTHON MODE: compares pyproject.toml with what is installed (metadata only, nothing is imported).
# MODE says: the faults, to stderr; path: the interpreter's path if it is fit; FILE: what pip shall install, and into
# FILE.pins what it shall keep. Exit status 0: fit; 2: no such extra; 3: packages are missing; 4: something is too old.
check() {
    "$1" - "$2" "$root/pyproject.toml" "$root/constraints.txt" ${extras[@]+"${extras[@]}"} <<'PY'
import sys
mode, pyproject, constraints, *extras = sys.argv[1:]
if sys.version_info < (3, 11):
    if mode == "says":
        print(f"setup: {sys.executable} is Python {sys.version.split()[0]}; 3.11 or newer is needed", file=sys.stderr)
    sys.exit(4)
import importlib.metadata, tomllib
try:
    from packaging.requirements import Requirement
except ImportError:
    from pip._vendor.packaging.requirements import Requirement
with open(pyproject, "rb") as file:
    table = tomllib.load(file)
project, optional = table["project"], table["tool"]["setup"]["may-be-missing"]
unknown = [extra for extra in extras if extra not in project["optional-dependencies"]]
if unknown:
    known = ", ".join(project["optional-dependencies"])
    print(f"setup: no extra named {unknown[0]}; pyproject.toml has: {known}", file=sys.stderr)
    sys.exit(2)
lines = project["dependencies"] + [line for extra in extras for line in project["optional-dependencies"][extra]]
wanted = [Requirement(line) for line in lines]
missing, old, kept = [], [], []
for need in wanted:
    if need.marker is not None and not need.marker.evaluate():
        continue
    try:
        have = importlib.metadata.version(need.name)
    except importlib.metadata.PackageNotFoundError:
        missing.append(need)
        continue
    (kept if need.specifier.contains(have, prereleases=True) else old).append((need, have))
lacking = [need for need in missing if need.name not in optional]
if mode == "says":
    faults = [f"{need.name} is missing" for need in lacking]
    faults += [f"{need.name} {have} is not {need.specifier}" for need, have in old]
    print(f"setup: {sys.executable}: {', '.join(faults) or 'fit'}", file=sys.stderr)
elif mode == "path":
    if not (old or lacking):
        for need in missing:
            print(f"setup: {need.name} is not installed in {sys.prefix}: {optional[need.name]}", file=sys.stderr)
        print(sys.executable)
else:
    pinned = {need.name for need, _ in kept}
    with open(constraints) as file:
        pins = [line for line in file if line.split("==")[0].strip() not in pinned]
    with open(mode, "w") as file:
        file.writelines(f"{need.name}{need.specifier}\n" for need in missing + [n for n, _ in old])
    with open(mode + ".pins", "w") as file:
        file.writelines(pins + [f"{need.name}=={have}\n" for need, have in kept])
sys.exit(4 if old else 3 if lacking else 0)
PY
}

# The active environment's python, if there is one; conda's base is nobody's project and does not count.
active=
if [[ -n ${VIRTUAL_ENV-} && -x $VIRTUAL_ENV/bin/python ]]; then
    active=$VIRTUAL_ENV/bin/python
elif [[ -n ${CONDA_PREFIX-} && ${CONDA_DEFAULT_ENV-} != base && -x $CONDA_PREFIX/bin/python ]]; then
    active=$CONDA_PREFIX/bin/python
fi
plain=$(command -v python3 || true)
own=$root/.venv/bin/python

find_fit() {
    local python status
    for python in "$active" "$plain" "$own"; do
        [[ -n $python && -x $python ]] || continue
        check "$python" path && exit 0 || status=$?
        [[ $status != 2 ]] || exit 2
    done
}

# One installs at a time; nobody takes an environment for fit that is being installed.
lock=$root/.setup.lock
if [[ -e $lock ]] && command -v flock >/dev/null; then
    exec 9<"$lock"
    flock -s -n 9 || { say "another setup.sh is at work in $root; waiting for it"; flock -s 9; }
fi
find_fit
if command -v flock >/dev/null; then
    exec 9>"$lock"
    flock -n 9 || { say "another setup.sh is at work in $root; waiting for it"; flock 9; }
    find_fit
fi

python=$own
if [[ -n $active ]]; then
    check "$active" says && status=0 || status=$?
    if [[ $status == 3 ]] && "$active" -m pip --version >/dev/null 2>&1; then
        say "adding what is missing to the active environment, changing nothing (deactivate it to get .venv instead)"
        python=$active
    fi
elif [[ -n $plain ]]; then
    check "$plain" says || true
fi

if [[ $python == "$own" ]] && ! "$own" -m pip --version >/dev/null 2>&1; then
    for base in python3 python3.12 python3.11; do
        "$base" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null && break || base=
    done
    [[ -n $base ]] || base=$plain   # a newer one than was tested
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
        die "no Python 3.11 or 3.12 as python3, python3.12, python3.11: install one, or activate an environment of it"
    say "making $root/.venv with $("$base" --version)"
    "$base" -m venv --clear "$root/.venv" ||
        die "$base could not make a virtual environment (Debian, Ubuntu: apt-get install python3-venv)"
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
check "$python" "$work/need" || true
say "installing into $(dirname "$(dirname "$python")"): $(tr '\n' ' ' <"$work/need")"
[[ -t 2 ]] && quiet=() || quiet=(--quiet)   # progress bars on a terminal
if ! "$python" -m pip --disable-pip-version-check install ${quiet[@]+"${quiet[@]}"} \
    --requirement "$work/need" --constraint "$work/need.pins" >&2; then
    check "$python" says || true
    die "pip could not install what is missing (reasons above); without a network, install it by hand and try again"
fi
find_fit
check "$python" says || true
die "pip has finished and something is still missing: remove $root/.venv and try again"
