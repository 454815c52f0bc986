#!/usr/bin/env bash
# tests/run.sh [fast] [pytest arguments]   everything that a CPU can prove; fast: only what takes seconds
# Two files at a time; with -n 4 four, with -n 0 one after the other, in this process (for a debugger).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$(bash setup.sh test label)
export PATH="$(dirname "$python"):$PATH" OMP_NUM_THREADS=1
has() { "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }
select=() parallel=()
if [[ ${1-} == fast ]]; then select=(-m "not slow"); shift; fi
if has ruff; then "$python" -m ruff check .; fi
if has xdist; then parallel=(-n 2 --dist loadfile --no-loadscope-reorder); fi   # conftest.py has the order
exec "$python" -m pytest ${parallel[@]+"${parallel[@]}"} ${select[@]+"${select[@]}"} "$@"
