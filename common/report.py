"""A run's report.html, made anew from its folder; of several folders one page that compares them.

python -m common.report outputs/mine/full
python -m common.report outputs/mine/full outputs/mine/lora --output compared.html
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.record.folder import write_atomically
from common.record.report import report, write_report
from common.record.report_parts import read_run
from common.start.plan import explained_errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="OUT", help="output_dir of a run")
    parser.add_argument(
        "--output", type=Path, default=Path("report.html"), help="the page, where several are compared"
    )
    args = parser.parse_args()
    if len(args.runs) == 1:
        print(write_report(args.runs[0]))
    else:
        write_atomically(args.output, report([read_run(folder) for folder in args.runs]))
        print(args.output)


if __name__ == "__main__":
    with explained_errors():
        main()
