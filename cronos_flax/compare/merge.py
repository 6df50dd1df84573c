"""The parts of a sweep that was done on several machines, put together to what one machine would have written."""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

from cronos_flax._head.files import at_rest, locked, replace
from cronos_flax._solver.user_warnings import warn
from cronos_flax.compare.results import by_run, check_same, kept, lines_of, repaired
from cronos_flax.compare.shards import PLAN, Plan, Shard
from cronos_flax.compare.task import Row, Run

_NAMED = 8  # runs of a part that an error names, and parts that a warning names
_ENVIRONMENT = ("versions", "device", "cores")


def merge(out: Path, parts: Sequence[Path]) -> list[Row]:
    """Merge the parts of a sweep into ``out / "results.jsonl"``. The directory is held meanwhile.

    Runs come in the order of one machine; those of several sweeps, one sweep after the other. Nothing is written unless
    the parts are whole and fit together. What the file has already stays, and the other runs are added, all at once.

    Args:
        out: the directory; made if it does not exist.
        parts: the directories that ``cronos-flax compare --shard`` made, or :func:`cronos_flax.compare.sweep.sweep`
            with a shard.

    Returns:
        The rows of all runs of the sweep.

    Raises:
        ValueError: if a part is none, is damaged, or is of other settings or data; if runs are missing, or have
            different rows in two directories. The message names them.
        BlockingIOError: if a part or ``out`` is being written by another process; the message says which does.
        OSError: if ``out`` cannot be written to.

    Warns:
        UserWarning: if rows come from different devices, numbers of cores or versions: seconds cannot be compared then.
    """
    merged = collected(parts)
    with locked(out):
        return merged.add_to(out)


@dataclasses.dataclass(frozen=True)
class Part:
    """A directory of finished runs, as it was read.

    Args:
        directory: where that is.
        name: what errors call it.
        runs: the rows of each run.
    """

    directory: Path
    name: str
    runs: dict[Run, list[Row]]


@dataclasses.dataclass(frozen=True)
class Merged:
    """All runs of a sweep.

    Args:
        shared: what all rows repeat, as in a :class:`Plan`.
        parts: from which the runs are.
        planned: all runs, in the order of one machine.
    """

    shared: Row
    parts: tuple[Part, ...]
    planned: tuple[Run, ...]

    def add_to(self, out: Path) -> list[Row]:
        """Add the runs to the results of a directory that the caller holds; return the rows of all planned runs.

        Raises:
            ValueError: if the directory holds rows of other settings or data, or other rows of these runs.
        """
        if any(part.directory.resolve() == out.resolve() for part in self.parts):
            raise ValueError(f"`out` must be none of the parts, got {out}. Give another directory.")
        path = out / "results.jsonl"
        there = Part(out, f"`out` {out}", by_run(kept(path)))
        rows = (row for run in there.runs.values() for row in run)
        check_same(rows, self.shared, there.name, self.parts[0].name, "Give another directory.")
        sources = (there, *self.parts)
        runs = _united(sources)
        _warn_of_repeats(sources)
        _warn_of_environments(sources)
        new = [run for run in dict.fromkeys([*self.planned, *runs]) if run not in there.runs]
        repaired(path)
        if new:
            old = path.read_bytes() if path.exists() else b""
            replace(path, old + b"".join(lines_of(runs[run]) for run in new))
        return [row for run in self.planned for row in runs[run]]


def collected(parts: Sequence[Path]) -> Merged:
    """Read the parts of a sweep, and check that they are whole and fit together.

    Args:
        parts: their directories; one that is given twice counts once.

    Raises:
        ValueError: as :func:`merge`.
        BlockingIOError: if a part is being written.
    """
    read = [_read(directory) for directory in {part.resolve(): part for part in parts}.values()]
    if not read:
        raise ValueError("`parts` must be at least one directory, got none.")
    first, shared = read[0][0], read[0][1].shared
    for part, plan in read:
        remedy = "Only parts of the same settings and data can be merged."
        either = {**dict.fromkeys(plan.shared), **shared}  # another version may have more settings
        check_same([plan.shared], either, part.name, first.name, remedy)
        rows = (row for run in part.runs.values() for row in run)
        check_same(rows, plan.shared, part.name, f"its {PLAN}", remedy)
    _check_whole(_united(part for part, _ in read), read)
    planned = tuple(dict.fromkeys(run for _, plan in read for run in plan.runs))
    return Merged(shared, tuple(part for part, _ in read), planned)


def _read(directory: Path) -> tuple[Part, Plan]:
    name = f"PART {directory}"
    if not directory.is_dir():
        raise ValueError(f"{name} must be a directory that `compare --shard` made, and there is none.")
    with at_rest(directory, "PART"):
        plan, rows = Plan.read(directory, name), kept(directory / "results.jsonl", name)
    if plan is None:
        inside = sorted(path.parent.name for path in directory.glob(f"*/{PLAN}"))
        raise ValueError(
            f"{name} must be a directory that `compare --shard` made, with the file {PLAN}, and there is none in it. "
            + (f"Give the parts that lie in it: {directory}/part-*." if inside else "Give the parts of a sweep.")
        )
    return Part(directory, name, by_run(rows)), plan


def _united(parts: Iterable[Part]) -> dict[Run, list[Row]]:
    """The rows of each run; of one that several parts have, those of the first.

    Raises:
        ValueError: if two parts have different figures of a run.
    """
    runs: dict[Run, tuple[Part, list[Row]]] = {}
    for part in parts:
        for run, rows in part.runs.items():
            first, there = runs.setdefault(run, (part, rows))
            figure = _different(there, rows)
            if figure is not None:
                raise ValueError(
                    f"{first.name} and {part.name} both have the run {run.name}, with different rows: {figure}. Find "
                    "out why (other code, another machine?), delete the lines of that run in one of the two, and merge "
                    "again."
                )
    return {run: rows for run, (_, rows) in runs.items()}


def _warn_of_repeats(parts: Iterable[Part]) -> None:
    """Warn if a run was done twice, for the seconds of one of them are not used."""
    parts = list(parts)
    for i, part in enumerate(parts):
        for first in parts[:i]:
            both = [run.name for run, rows in part.runs.items() if first.runs.get(run, rows) != rows]
            if both:
                warn(
                    f"{first.name} and {part.name} both have {_some(both)}: with equal figures, but other seconds or "
                    f"another machine. The rows in {first.name} are used."
                )


def _different(rows: list[Row], others: list[Row]) -> str | None:
    """The first figure in which two runs differ, but for times and the environment; None if there is none."""
    if len(rows) != len(others):
        return f"{len(rows)} checks, and {len(others)}"
    for row, other in zip(rows, others, strict=True):
        for name in dict.fromkeys([*row, *other]):
            if not name.endswith("seconds") and name not in _ENVIRONMENT and row.get(name) != other.get(name):
                return f"{name} at epoch {row['epoch']} is {row.get(name)!r}, and {other.get(name)!r}"
    return None


def _check_whole(runs: Iterable[Run], read: list[tuple[Part, Plan]]) -> None:
    """Check that no run is missing."""
    planned = {run for _, plan in read for run in plan.runs}
    missing = planned.difference(runs)
    if not missing:
        return
    sweeps = list(dict.fromkeys(plan.runs for _, plan in read))
    lines = [f"{len(missing)} of {len(planned)} runs are missing, and nothing was merged."]
    if len(sweeps) > 1:
        lines.append(f"The parts are of {len(sweeps)} sweeps, not of one.")
    for sweep in sweeps:
        names = {plan.shard: part.name for part, plan in read if plan.runs == sweep}
        number = next(iter(names)).of
        if len(sweeps) > 1:
            given = _some([*names.values()], 2)
            lines.append(f"Of the sweep of {len(sweep)} runs ({given}):")
        for shard in (Shard(k, number) for k in range(1, number + 1)):
            mine = [run.name for run in shard.deal(sweep) if run in missing]
            if mine:
                where = names.get(shard, "not among the parts given")
                lines.append(f"`--shard {shard}`, {where}: {len(mine)} missing: {_some(mine)}.")
    lines.append(
        "Give the `compare` command again with each `--shard` that is named here: it does what is missing. Or, if that "
        "part is done, give its directory too. Then merge again."
    )
    raise ValueError("\n".join(lines))


def _warn_of_environments(parts: Iterable[Part]) -> None:
    """Warn if devices, cores or versions differ."""
    values: dict[str, dict[str, dict[str, None]]] = {}
    for part in parts:
        for rows in part.runs.values():
            environment = {name: rows[0].get(name) for name in _ENVIRONMENT}
            for name, value in {**(environment.pop("versions") or {}), **environment}.items():
                values.setdefault(name, {}).setdefault(str(value), {})[part.name] = None
    differ = [
        f"{name} {value} in {_some([*names], 2)}"
        for name, by_value in values.items()
        for value, names in by_value.items()
        if len(by_value) > 1
    ]
    if differ:
        warn(f"The parts were made in different ways: {'; '.join(differ)}. Their seconds cannot be compared.")


def _some(names: list[str], most: int = _NAMED) -> str:
    more = len(names) - most
    return "; ".join(names[:most]) + (f"; and {more} more" if more > 0 else "")
