"""Which fault befalls which function where: the case of a number, from a seed."""

import functools
from typing import NamedTuple

import numpy as np

from .solved import FitHead, FitNnx, Solve, SolveHead, SolveNnx
from .subject import Subject
from .swept import Compare, Sweep, TrainCommand
from .trained import PlainTrain, Restore, Save, Train

SUBJECTS: dict[str, type[Subject]] = {
    kind.name: kind
    for kind in (
        Save, Restore, Train, PlainTrain, FitHead, SolveHead, Solve, FitNnx, SolveNnx, Sweep, Compare, TrainCommand
    )
}  # fmt: skip
FAULTS = (
    "kill", "full disk", "flipped byte", "truncated file", "NaN in features", "raising callback", "raising loader",
    "two writers", "read-only directory",
)  # fmt: skip
OF_VALUES = ("NaN in features", "raising callback", "raising loader")  # and of the user's code; the others are of files
PAIRS = [(name, fault) for name, kind in SUBJECTS.items() for fault in kind.faults]


class Case(NamedTuple):
    """A case; ``place`` seeds all else that is drawn for it."""

    number: int
    function: str
    fault: str
    place: tuple[int, int]

    @property
    def rng(self) -> np.random.Generator:
        """Draws the place."""
        return np.random.default_rng(self.place)


def case(seed: int, number: int) -> Case:
    """Each pair of a function and a fault comes once in ``len(PAIRS)`` cases, in a random order."""
    block, place = divmod(number, len(PAIRS))
    return Case(number, *PAIRS[_order(seed, block)[place]], (seed, number))


@functools.lru_cache(maxsize=4)
def _order(seed: int, block: int) -> list[int]:
    return np.random.default_rng((seed, block, len(PAIRS))).permutation(len(PAIRS)).tolist()
