"""The command: see the package."""

import argparse
import os
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    """Run the cases, print the table; 1 if one of them is neither right nor clear."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults")
    parser.add_argument("--faults", type=int, default=1000, metavar="N", help="how many cases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, default=Path("faults.jsonl"), metavar="FILE", help="rows; resumes from them"
    )
    parser.add_argument("--functions", metavar="LIST", help="only these, separated by commas")
    parser.add_argument("--case", type=int, metavar="K", help="this case only, not written to FILE")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    import conftest

    conftest.pytest_configure(None)  # programs are kept where those of the tests are
    from .campaign import cases, run, table
    from .draw import case

    if args.case is not None:
        [row] = run([case(args.seed, args.case)])
        print(*(f"{name}: {value}" for name, value in row.items()), sep="\n")
        return int(row["outcome"] == "other")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the disk is given back
    began = time.process_time()
    functions = None if args.functions is None else args.functions.split(",")

    def tell(row: dict) -> None:
        print(f"{row['case']:5} {row['function']:35} {row['fault']:20} {row['outcome']:13} {row['reason']}", flush=True)

    rows = run(cases(args.faults, args.seed, functions), args.out, tell)
    print(f"\nright result / clear error, of {len(rows)} faults, seed {args.seed}:\n\n{table(rows)}")
    others = [row for row in rows if row["outcome"] == "other"]
    children = sum(os.times()[2:4])
    print(f"\n{len(rows) - len(others)} of {len(rows)}; {time.process_time() - began + children:.0f} CPU seconds")
    for row in others:
        print(f"  case {row['case']}: {row['function']}, {row['fault']}, {row['where']}: {row['reason']}")
    return int(bool(others))


if __name__ == "__main__":
    sys.exit(main())
