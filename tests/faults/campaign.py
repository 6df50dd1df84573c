"""Many cases: a row for each, and the table of their outcomes."""

import collections
import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .attack import CLEAR, OTHER, RIGHT, Attacker
from .draw import FAULTS, OF_VALUES, SUBJECTS, Case, case

Row = dict[str, Any]


def cases(faults: int, seed: int = 0, functions: Iterable[str] | None = None) -> list[Case]:
    """The first so many cases, of these functions."""
    wanted, found, number = set(SUBJECTS if functions is None else functions), [], 0
    while len(found) < faults:
        drawn = case(seed, number)
        found += [drawn] if drawn.function in wanted else []
        number += 1
    return found


def run(wanted: Iterable[Case], out: Path | None = None, tell: Callable[[Row], Any] = lambda _: None) -> list[Row]:
    """The rows of cases; those that are in ``out`` already are not run again, new ones are added to it."""
    rows = {row["case"]: row for row in read(out)} if out is not None else {}
    wanted = list(wanted)
    missing = [c for c in wanted if c.number not in rows]
    if missing:
        with tempfile.TemporaryDirectory(prefix="faults") as home:
            Path(home).chmod(0o755)
            attacker = Attacker(Path(home))
            try:
                for each in missing:
                    row = rows[each.number] = attacker(each)
                    if out is not None:
                        with out.open("a") as file:
                            file.write(json.dumps(row) + "\n")
                    tell(row)
            finally:
                attacker.close()
    return [rows[c.number] for c in wanted]


def read(out: Path) -> list[Row]:
    """Rows; a line that was cut short is none."""
    if not out.exists():
        return []
    lines = out.read_text().split("\n")
    if lines[-1]:
        out.write_text("\n".join(lines[:-1]) + "\n" if lines[:-1] else "")
    return [json.loads(line) for line in lines[:-1]]


def table(rows: list[Row]) -> str:
    """Right results / clear errors of each function and fault; what is neither is shown as a third number.

    Two tables: of faults of files and processes; and of values and the user's code, with all faults of both in the end.
    """
    counts: dict[tuple[str, str], collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for row in rows:
        for key in ((row["function"], row["fault"]), ("all", row["fault"]), (row["function"], "all"), ("all", "all")):
            counts[key][row["outcome"]] += 1

    def cell(function: str, fault: str) -> str:
        count = counts.get((function, fault))
        if count is None:
            return ""
        return f"{count[RIGHT]} / {count[CLEAR]}" + (f" / **{count[OTHER]}**" if count[OTHER] else "")

    there = [fault for fault in FAULTS if ("all", fault) in counts]
    functions = [name for name in SUBJECTS if (name, "all") in counts] + ["all"]
    of_values = [fault for fault in there if fault in OF_VALUES]
    lines = []
    for faults in ([fault for fault in there if fault not in OF_VALUES], [*of_values, "all"]):
        lines += [f"| function | {' | '.join(faults)} |", "|---" * (len(faults) + 1) + "|"]
        for function in functions:
            cells = [cell(function, fault) for fault in faults]
            if any(cells):
                name = "all" if function == "all" else f"`{function}`"
                lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines).rstrip()
