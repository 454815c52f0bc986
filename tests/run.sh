#!/usr/bin/env bash
# tests/run.sh [fast] [pytest arguments]   everything that a CPU can prove; fast: only what takes seconds
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$(bash setup.sh test label)
export PATH="$(dirname "$python"):$PATH"
select=()
if [[ ${1-} == fast ]]; then select=(-m "not slow"); shift; fi
if "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("ruff") is None)'; then
    "$python" -m ruff check .
fi
exec "$python" -m pytest ${select[@]+"${select[@]}"} "$@"
