"""Checkpoints and ``cf.train``."""

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from .harm import Loader, Spoil
from .subject import Subject, Value, checksum, told, untimed

_RNG = np.random.default_rng(0)
X = _RNG.normal(size=(256, 5)).astype("float32")
Y = (X[:, 0] * X[:, 1] > 0).astype(int)
ROWS, EPOCHS = 64, 3  # of a batch; of a run
BATCHES = [(X[i : i + ROWS], Y[i : i + ROWS]) for i in range(0, len(X), ROWS)]
_FILES = ("kill", "full disk", "flipped byte", "truncated file", "two writers", "read-only directory")
_HANDED = ("NaN in features", "raising callback", "raising loader")


@functools.cache
def small(step: int) -> Any:
    """A state to save."""
    import jax

    rng = np.random.default_rng(step)
    weights = jax.numpy.asarray(rng.normal(size=(64, 8)).astype("float32"))
    return {"weights": weights, "counts": rng.integers(0, 9, 5), "key": jax.random.key(step), "step": step}


def steps(directory: Path) -> list[int]:
    """The steps of the checkpoints in a directory."""
    return sorted(int(path.name) for path in directory.glob("*") if path.name.isdecimal())


def sound(directory: Path, like: Any) -> dict[str, int]:
    """The checksum of each checkpoint that can be restored."""
    from cronos_flax._alternation.checkpoint import restored

    found = {}
    for step in steps(directory):
        try:
            (state, got, _), _ = told(functools.partial(restored, directory, like, step=step))
        except ValueError:
            continue
        if got == step:
            found[str(step)] = checksum(state)
    return found


def gone(before: Value, after: Value) -> str | None:
    """Which checkpoints are not what they were; None for none."""
    steps = [step for step in before if after.get(step) != before[step]]
    return f"the checkpoint of step {', '.join(steps)}" if steps else None


class _Checkpoints(Subject):
    """Two checkpoints lie there."""

    def make_template(self, directory: Path) -> None:
        import cronos_flax as cf

        for step in (1, 2):
            cf.save_checkpoint(directory, small(step), step)

    def variables(self) -> Any:
        return small(2), small(3)

    def kept(self, directory: Path) -> Value:
        return sound(directory, small(0))

    def lost(self, before: Value, after: Value) -> str | None:
        return gone(before, after)


class Save(_Checkpoints):
    """The next checkpoint is saved; over a damaged one, where that has its number."""

    name = "cf.save_checkpoint"
    faults = _FILES

    def run(self, directory: Path, spoil: Spoil) -> Value:
        import cronos_flax as cf

        if 3 not in steps(directory):
            cf.save_checkpoint(directory, small(3), 3)
        state, _ = told(lambda: cf.restore_checkpoint(directory, small(0)))
        return checksum(state)

    def beside(self, directory: Path, rng: np.random.Generator) -> Value:
        import cronos_flax as cf

        step = int(rng.integers(2, 5))
        if step == 2:
            return self.found(directory)
        cf.save_checkpoint(directory, small(step), step)
        return self.reference

    def found(self, directory: Path) -> Value:
        """What a reader finds meanwhile: the newest checkpoint, which may be the one before."""
        import cronos_flax as cf

        state, _ = told(lambda: cf.restore_checkpoint(directory, small(0)))
        return self.reference if checksum(state) == checksum(small(2)) else checksum(state)

    def is_right(self, value: Value, spoil: Spoil, damaged: bool) -> bool:
        return value in (checksum(small(3)), checksum(small(4)))

    def dirties(self, damaged: bool) -> bool:
        return False


class Restore(_Checkpoints):
    """The newest sound checkpoint is restored."""

    name = "cf.restore_checkpoint"
    faults = _FILES
    reads = True

    def run(self, directory: Path, spoil: Spoil) -> Value:
        import cronos_flax as cf

        state, said = told(lambda: cf.restore_checkpoint(directory, small(0)))
        return [checksum(state), any("passed over what is damaged" in text for text in said)]

    def beside(self, directory: Path, rng: np.random.Generator) -> Value:
        import cronos_flax as cf

        cf.save_checkpoint(directory, small(3), 3)
        return self.reference

    def is_right(self, value: Value, spoil: Spoil, damaged: bool) -> bool:
        older, newest, newer = (checksum(small(step)) for step in (1, 2, 3))
        return value in ([newest, False], [newer, False]) or (damaged and value == [older, True])


class Train(Subject):
    """A run of three epochs; that of the first, or of two, is saved."""

    name = "cf.train"
    faults = (*_FILES, *_HANDED)
    alternates = True

    @functools.cached_property
    def state(self) -> Any:
        """A state to begin with."""
        return made(self.alternates)

    def _train(self, directory: Path, spoil: Spoil) -> tuple[Any, list[dict[str, Any]]]:
        import cronos_flax as cf

        x = np.concatenate([spoil.features(i, x) for i, (x, _) in enumerate(BATCHES)]) if spoil.arrays else None
        return cf.train(
            self.state,
            Loader(BATCHES, spoil) if x is None else (x, Y),
            epochs=EPOCHS,
            batch_size=ROWS,
            loss="softmax",
            callbacks=[spoil.callback],
            directory=directory,
        )

    def make_template(self, directory: Path) -> None:
        self._train(directory, Spoil())
        shutil.rmtree(directory / str(steps(directory)[-1]))

    def prepare(self, directory: Path, several: bool = False) -> None:
        super().prepare(directory)
        if not several:
            shutil.rmtree(directory / str(steps(directory)[-1]))

    def run(self, directory: Path, spoil: Spoil) -> Value:
        newest = max(steps(directory), default=0)
        firsts: list[int] = []
        callback = spoil.callback

        def first(row: dict[str, float]) -> None:
            firsts.append(int(row["step"]))
            callback(row)

        spoil.callback = first  # type: ignore[method-assign]
        (state, history), said = told(lambda: self._train(directory, spoil))
        if firsts and firsts[0] < newest and not any("damaged" in text for text in said):
            return f"began at step {firsts[0]}, with a checkpoint of step {newest}"
        text = json.dumps(untimed(history))
        finite = all(np.all(np.isfinite(leaf)) for leaf in leaves(state.params))
        return {"state": checksum(state), "history": text, "finite": finite, "said": spoken(said)}

    def variables(self) -> Any:
        return self.state, X, Y

    def is_right(self, value: Value, spoil: Spoil, damaged: bool) -> bool:
        if not isinstance(value, dict):
            return False
        if self.same(value, self.reference):
            return True
        if spoil.nan is None:
            return False
        # The guard has gone back, or the state is lost and that is said.
        has_gone_back = value["finite"] and ('"accepted": false' in value["history"] or "NaN" in value["history"])
        return has_gone_back or any("not finite" in text for text in value["said"])

    def same(self, value: Value, other: Value) -> bool:
        given = isinstance(value, dict) and isinstance(other, dict)
        return given and {**value, "said": []} == {**other, "said": []}

    def kept(self, directory: Path) -> Value:
        return sound(directory, self.state)

    def lost(self, before: Value, after: Value) -> str | None:
        return gone(before, after)


class PlainTrain(Train):
    """The same by gradients alone."""

    name = "cf.train (TrainState)"
    faults = _HANDED
    alternates = False


def leaves(tree: Any) -> list[Any]:
    """The arrays of a tree."""
    import jax

    return jax.tree.leaves(tree)


def spoken(said: list[str]) -> list[str]:
    """The warnings of this package."""
    return [text for text in said if text.startswith(("train:", "solve_head:", "restore_checkpoint:"))]


@functools.cache
def network() -> tuple[Any, Any, Any]:
    """A model, its variables and its head."""
    import flax.linen as nn
    import jax

    import cronos_flax as cf

    model = nn.Sequential([nn.Dense(8), nn.leaky_relu, nn.Dense(6), nn.relu, nn.Dense(2)])
    variables = {"params": model.init(jax.random.key(1), X)["params"]}
    return model, variables, cf.find_head(model, variables, X[:ROWS])


def made(alternates: bool, solver: Any = None) -> Any:
    """A train state."""
    import optax
    from flax.training.train_state import TrainState

    import cronos_flax as cf

    model, variables, head = network()
    given = {"apply_fn": model.apply, "params": variables["params"], "tx": optax.adam(1e-2)}
    if not alternates:
        return TrainState.create(**given)
    return cf.CronosTrainState.create(**given, head=head, solver=solver or cf.Cronos(loss="softmax"))
