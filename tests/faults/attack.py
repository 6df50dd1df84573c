"""A case: the call of a function under its fault, and the judgement of what came of it."""

import dataclasses
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .draw import SUBJECTS, Case
from .harm import KINDS, Beside, Disk, Spoil, flip, truncate, watched
from .killed import Killer
from .subject import Subject, Value, checksum, remove
from .swept import CommandError

RIGHT, CLEAR, OTHER = "right result", "clear error", "other"
_NAMED = (
    "save_checkpoint: ",
    "restore_checkpoint: ",
    "train: ",
    "fit_head: ",
    "solve_head: ",
    "solve: ",
    "load: ",
    "`out`",
)


@dataclasses.dataclass
class Attempt:
    """What came of a call."""

    where: str = ""
    value: Value = None
    error: BaseException | None = None
    killed: bool = False
    damaged: bool = False


class WrongError(Exception):
    """An outcome that is neither a right result nor a clear error."""


class Attacker:
    """Runs cases.

    Args:
        home: an empty directory for them.
    """

    def __init__(self, home: Path) -> None:
        (home / "templates").mkdir()
        (home / "cases").mkdir()
        self.home, self.disk, self.killer = home, Disk(home / "cases"), Killer()
        self.subjects: dict[str, Subject] = {}

    def close(self) -> None:
        """Give back what was taken."""
        self.killer.close()
        self.disk.close()

    def subject(self, name: str) -> Subject:
        """The function of this name, with its undisturbed call known."""
        if name not in self.subjects:
            made = SUBJECTS[name]()
            made.home = self.home / "templates"
            _ = made.reference
            self.subjects[name] = made
            gc.freeze()  # restoring collects garbage: without all this
        return self.subjects[name]

    def __call__(self, case: Case) -> dict[str, Any]:
        """The row of a case."""
        subject = self.subject(case.function)
        top = self.disk.directory / str(case.number)
        top.mkdir()
        began = time.process_time()
        attempt, outcome, reason = Attempt(), OTHER, ""
        try:
            outcome = self._judged(subject, case, top, attempt)
        except WrongError as error:
            reason = str(error)
        finally:
            remove(top)
        said = f"{type(attempt.error).__name__}: {attempt.error}" if attempt.error is not None else ""
        return {
            "case": case.number, "seed": case.place[0], "function": case.function, "fault": case.fault,
            "where": attempt.where, "outcome": outcome, "reason": reason.replace(str(top), "DIR")[:500],
            "said": said.replace(str(top), "DIR")[:500], "seconds": round(time.process_time() - began, 3),
        }  # fmt: skip

    def _judged(self, subject: Subject, case: Case, top: Path, attempt: Attempt) -> str:
        directory, spoil = top / "run", Spoil()
        subject.prepare(directory, case.fault in ("flipped byte", "truncated file") and bool(case.place[1] % 2))
        mine = checksum(subject.variables())
        fault = getattr(self, "_" + case.fault.lower().replace(" ", "_").replace("-", "_"))
        call = fault(subject, directory, case.rng, spoil, attempt)
        before = subject.kept(directory)
        _attempted(call, attempt)
        if checksum(subject.variables()) != mine:
            raise WrongError("the caller's variables were changed")
        outcome = self._of(subject, spoil, attempt, directory, case.fault)
        lost = subject.lost(before, subject.kept(directory))
        if lost:
            raise WrongError(f"lost: {lost}")
        again = Attempt()
        _attempted(lambda: subject.run(directory, Spoil()), again)
        if again.error is not None:
            if not (attempt.damaged and outcome == CLEAR and is_clear(again.error, directory, "")):
                raise WrongError(f"afterwards, without the fault: {type(again.error).__name__}: {again.error}")
        elif not (subject.same(again.value, attempt.value) or subject.is_right(again.value, Spoil(), attempt.damaged)):
            raise WrongError(f"afterwards, without the fault, another result: {_difference(subject, again.value)}")
        return outcome

    def _of(self, subject: Subject, spoil: Spoil, attempt: Attempt, directory: Path, fault: str) -> str:
        """Whether what came of the call is right or clear."""
        if attempt.killed:
            return RIGHT  # if the same call then goes on to the right result
        error = attempt.error
        if error is None:
            if subject.is_right(attempt.value, spoil, attempt.damaged):
                return RIGHT
            raise WrongError(f"a wrong result: {_difference(subject, attempt.value)}")
        if spoil.raised is not None:
            if error is spoil.raised:
                return CLEAR
            raise WrongError(f"the user's own {spoil.raised!r} was raised as {error!r}")
        if not is_clear(error, directory, fault):
            raise WrongError(f"not clear: {type(error).__name__}: {error}")
        return CLEAR

    # Each gives the call to make; what lies there is damaged before.

    def _kill(
        self, subject: Subject, directory: Path, rng: np.random.Generator, spoil: Spoil, attempt: Attempt
    ) -> Callable[[], Value]:
        whole = subject.undisturbed
        kind, at, part = rng.integers(3), rng.random(), float(rng.random())
        job: dict[str, Any] = {"operation": 0, "write": 0, "part": part, "largest": None}
        if kind == 0:
            job["largest"] = int(at * whole.largest)
            attempt.where = f"where a file grows beyond {job['largest']} bytes"
        elif kind == 1 and whole.writes:
            job["write"] = 1 + int(at * whole.writes)
            attempt.where = f"in write {job['write']} of {whole.writes}, after {part:.0%} of it"
        else:
            job["operation"] = 1 + int(at * whole.operations)
            attempt.where = f"before operation {job['operation']} of {whole.operations}"

        def call() -> Value:
            status = self.killer(function=subject.name, directory=str(directory), **job)
            attempt.killed = True
            attempt.where += ", not reached" if status == 0 else ""
            if status > 0:
                raise WrongError(f"the process ended with status {status}")

        return call

    def _full_disk(
        self, subject: Subject, directory: Path, rng: np.random.Generator, spoil: Spoil, attempt: Attempt
    ) -> Callable[[], Value]:
        whole, by_size, share = subject.undisturbed, bool(rng.random() < 0.3), rng.random()
        full = self.disk.full(int(share * whole.size), int(share * whole.largest), by_size)

        def call() -> Value:
            with full as attempt.where:
                return subject.run(directory, spoil)

        return call

    def _read_only_directory(
        self, subject: Subject, directory: Path, rng: np.random.Generator, spoil: Spoil, attempt: Attempt
    ) -> Callable[[], Value]:
        closed = self.disk.read_only(directory.parent, bool(rng.integers(2)))

        def call() -> Value:
            with closed as attempt.where:
                return subject.run(directory, spoil)

        return call

    def _two_writers(
        self, subject: Subject, directory: Path, rng: np.random.Generator, spoil: Spoil, attempt: Attempt
    ) -> Callable[[], Value]:
        operations = subject.undisturbed.operations
        at, second = 1 + int(rng.random() * operations), Attempt()
        attempt.where = f"before operation {at} of {operations}"
        other = Beside(lambda: _attempted(lambda: subject.beside(directory, rng), second))

        def call() -> Value:
            with watched(directory, at, other, subject.reads):
                try:
                    return subject.run(directory, spoil)
                finally:
                    began = other.end()
                    attempt.where += "" if began else ", not reached"
                    if began:
                        try:
                            self._of(subject, spoil, second, directory, "two writers")
                        except WrongError as error:
                            raise WrongError(f"the second: {error}") from None

        return call

    def _flipped_byte(
        self, subject: Subject, directory: Path, rng: np.random.Generator, spoil: Spoil, attempt: Attempt
    ) -> Callable[[], Value]:
        files = subject.damageable(directory)
        attempt.where = flip(files[rng.integers(len(files))], rng.random(), int(rng.integers(8)))
        attempt.damaged = True
        return lambda: subject.run(directory, spoil)

    def _truncated_file(
        self, subject: Subject, directory: Path, rng: np.random.Generator, spoil: Spoil, attempt: Attempt
    ) -> Callable[[], Value]:
        files = subject.damageable(directory)
        attempt.where = truncate(files[rng.integers(len(files))], rng.random())
        attempt.damaged = True
        return lambda: subject.run(directory, spoil)

    def _nan_in_features(
        self, subject: Subject, directory: Path, rng: np.random.Generator, spoil: Spoil, attempt: Attempt
    ) -> Callable[[], Value]:
        passes = subject.undisturbed.spoil.passed
        value = [np.nan, np.inf, -np.inf][rng.integers(3)]
        spoil.nan = int(rng.integers(4)), int(rng.integers(64)), int(rng.integers(5)), value
        spoil.arrays = bool(rng.random() < 0.3)
        first = int(rng.integers(1, passes + 1)) if passes and not spoil.arrays else 0
        spoil.passes = (first, first if rng.random() < 0.5 and first else np.inf)
        form = "arrays" if spoil.arrays else f"passes {spoil.passes[0]} to {spoil.passes[1]}"
        attempt.where = f"{value} in batch {spoil.nan[0]}, {form}"
        return lambda: subject.run(directory, spoil)

    def _raising_callback(
        self, subject: Subject, directory: Path, rng: np.random.Generator, spoil: Spoil, attempt: Attempt
    ) -> Callable[[], Value]:
        calls = subject.undisturbed.spoil.called
        spoil.callback_at, spoil.kind = int(rng.integers(1, calls + 1)), KINDS[rng.integers(len(KINDS))]
        attempt.where = f"call {spoil.callback_at} of {calls}"
        return lambda: subject.run(directory, spoil)

    def _raising_loader(
        self, subject: Subject, directory: Path, rng: np.random.Generator, spoil: Spoil, attempt: Attempt
    ) -> Callable[[], Value]:
        read = subject.undisturbed.spoil.read
        spoil.loader_at, spoil.kind = int(rng.integers(1, read + 1)), KINDS[rng.integers(len(KINDS))]
        attempt.where = f"batch {spoil.loader_at} of {read}"
        return lambda: subject.run(directory, spoil)


def _attempted(call: Callable[[], Value], attempt: Attempt) -> None:
    """Make a call, and note what came of it."""
    try:
        attempt.value = call()
    except WrongError:
        raise
    except BaseException as error:
        if type(error) in (KeyboardInterrupt, SystemExit):  # somebody stops the campaign
            raise
        attempt.error = error


def is_clear(error: BaseException, directory: Path, fault: str) -> bool:
    """Whether an error is of the house's kind: it names the argument or the file, in few words, and fits the fault."""
    text = str(error)
    if fault == "two writers" and not any(words in " ".join(text.split()) for words in ("is held by", "already")):
        return False
    if isinstance(error, CommandError):
        named = str(directory.parent) in error.said or "`" in error.said
        return error.status in (1, 2) and named and "Traceback" not in text and "error:" in text
    if len(text) > 1000:
        return False
    if isinstance(error, OSError):
        return str(directory) in text
    if isinstance(error, FloatingPointError):
        return text.startswith(_NAMED)
    if isinstance(error, ValueError):
        return text.startswith(_NAMED) and ("`" in text or str(directory.parent) in text)
    return False


def _difference(subject: Subject, value: Value) -> str:
    """Where a result differs from the undisturbed one."""
    right = subject.reference
    if isinstance(value, dict) and isinstance(right, dict):
        return "; ".join(f"{k}: {str(value.get(k))[:80]}" for k in right if value.get(k) != right[k])
    return f"{str(value)[:100]} for {str(right)[:100]}"
