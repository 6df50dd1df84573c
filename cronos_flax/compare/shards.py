"""A sweep in parts, each on a machine of its own: the runs of a part, and what it keeps beside their rows.

No run depends on what another one found, so each can be done anywhere. Each part has a directory of its own, with
``results.jsonl`` and ``sweep.json``, which says what the whole sweep is: its settings, its data, and all of its runs,
in their order. From it :mod:`cronos_flax.compare.merge` knows that nothing is missing.
"""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

from cronos_flax._head.files import replace
from cronos_flax.compare.results import lines_of
from cronos_flax.compare.task import Row, Run

PLAN = "sweep.json"


@dataclasses.dataclass(frozen=True)
class Shard:
    """One part of a sweep.

    Args:
        number: which part this is, counted from 1.
        of: how many there are.

    Raises:
        ValueError: if there is no such part.

    Example:
        >>> runs = [Run(method, None, seed) for seed in (0, 1) for method in ("cronos-am", "cronos")]
        >>> for number in (1, 2):
        ...     print(*Shard(number, 2).deal(runs))
        Run(method='cronos-am', rate=None, seed=0) Run(method='cronos', rate=None, seed=0)
        Run(method='cronos-am', rate=None, seed=1) Run(method='cronos', rate=None, seed=1)
    """

    number: int
    of: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.of:
            raise ValueError(f"`shard` must be K/N with 1 ≤ K ≤ N, such as 2/8, got '{self}'.")

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """The part that a text such as ``"2/8"`` names.

        Raises:
            ValueError: if it names none.
        """
        number, _, of = text.partition("/")
        if not (number.isdecimal() and of.isdecimal()):
            raise ValueError(f"`shard` must be K/N with 1 ≤ K ≤ N, such as 2/8, got {text!r}.")
        return cls(int(number), int(of))

    def directory(self, out: Path) -> Path:
        """Where this part is kept, in the directory of the sweep."""
        return out / f"part-{self.number}-of-{self.of}"

    def deal(self, runs: Iterable[Run]) -> list[Run]:
        """The runs of this part, in their order. All parts together have each run once.

        Runs of one method take about the same time. They are dealt in turn, method by method, so that two parts differ
        by one run at most, of each method and in all. Seeds of one rate follow each other and so go to different parts.
        """
        runs = list(dict.fromkeys(runs))
        cells: dict[str, dict[float | None, list[Run]]] = {}
        for run in runs:
            cells.setdefault(run.method, {}).setdefault(run.rate, []).append(run)
        in_turn = [run for rates in cells.values() for seeds in rates.values() for run in seeds]
        mine = set(in_turn[self.number - 1 :: self.of])
        return [run for run in runs if run in mine]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What ``sweep.json`` says.

    Args:
        shard: the part that the directory holds.
        shared: what all rows of the sweep repeat: the settings, and checksums as :attr:`Task.made_of` has them.
        runs: all runs of the whole sweep, in the order of one machine.
    """

    shard: Shard
    shared: Row
    runs: tuple[Run, ...]

    @classmethod
    def read(cls, directory: Path, name: str = "`out`") -> Self | None:
        """The plan of a directory; None if it has none.

        Raises:
            ValueError: if the file is damaged.
        """
        path = directory / PLAN
        if not path.exists():
            return None
        try:
            content = path.read_bytes()
            body: dict[str, Any] = json.loads(content)
            del body["crc32"]
            if lines_of([body]) != content:
                raise ValueError
            return cls(Shard(**body["shard"]), body["shared"], tuple(Run(*run) for run in body["runs"]))
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ValueError(
                f"{name}: {path} is damaged. Nothing was changed. Take the file from a copy, or delete it and give the "
                "`compare` command of this part again: it writes the file anew, and does no run twice."
            ) from None

    def write(self, directory: Path) -> None:
        """Keep the plan in a directory."""
        body = {"shard": dataclasses.asdict(self.shard), "shared": self.shared, "runs": self.runs}
        replace(directory / PLAN, lines_of([body]))

    def begin(self, directory: Path) -> list[Run]:
        """Keep the plan in a directory, or find it there; return the runs of its part.

        Raises:
            ValueError: if the directory holds a part of another sweep, or another part.
        """
        there = Plan.read(directory)
        if there is None:
            self.write(directory)
        elif there != self:
            raise ValueError(
                f"`out` {directory} holds part {there.shard} of a sweep with {len(there.runs)} runs, and this one is "
                f"part {self.shard} of {len(self.runs)} runs{'' if there.runs == self.runs else ', not the same'}. "
                "More runs are a sweep of their own: give another directory, and merge the parts of both."
            )
        return self.shard.deal(self.runs)
