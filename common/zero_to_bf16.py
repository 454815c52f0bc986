"""Another name for export.py, which DeepSpeed's users know: `python -m common.zero_to_bf16 CHECKPOINT OUT`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.export import main
from common.start.plan import explained_errors

if __name__ == "__main__":
    with explained_errors():
        main()
