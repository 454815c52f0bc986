"""A DeepSpeed checkpoint becomes bf16 weights, under the path that VideoX-Fun's commands name."""

import sys
from pathlib import Path

sys.path.insert(0, str(next(folder for folder in Path(__file__).resolve().parents if (folder / "common").is_dir())))

from common.start.plan import explained_errors
from common.zero_to_bf16 import main

if __name__ == "__main__":
    with explained_errors():
        main()
