"""Solves for a head, and of arrays."""

import functools
from pathlib import Path
from typing import Any

import numpy as np

from .harm import Loader, Spoil
from .subject import Subject, Value, checksum, told
from .trained import BATCHES, ROWS, X, Y, made, network


class _InMemory(Subject):
    faults = ("NaN in features", "raising callback", "raising loader")
    files = False

    def prepare(self, directory: Path, several: bool = False) -> None:
        """There are no files."""

    def variables(self) -> Any:
        return X, Y


def data_of(spoil: Spoil) -> Any:
    """The rows, in batches or whole."""
    if spoil.arrays:
        return np.concatenate([spoil.features(i, x) for i, (x, _) in enumerate(BATCHES)]), Y
    return Loader(BATCHES, spoil)


def solver() -> Any:
    """Of a head; with these settings all compile the same program."""
    import cronos_flax as cf

    return cf.Cronos(loss="softmax", max_iters=3, beta=1e-3)


class FitHead(_InMemory):
    """The head of a linen module."""

    name = "cf.fit_head"

    def run(self, directory: Path, spoil: Spoil) -> Value:
        import cronos_flax as cf

        _, variables, head = network()
        (fitted, _), _ = told(
            lambda: cf.fit_head(head, variables, data_of(spoil), solver=solver(), callback=spoil.callback)
        )
        return checksum(fitted)

    def variables(self) -> Any:
        return network()[1], X, Y


class SolveHead(_InMemory):
    """The head of a train state that was solved for before."""

    name = "CronosTrainState.solve_head"

    @functools.cached_property
    def state(self) -> Any:
        """After a solve."""
        return made(True, solver()).solve_head(Loader(BATCHES, Spoil()), callback=lambda _: None)[0]

    def run(self, directory: Path, spoil: Spoil) -> Value:
        (state, solution), _ = told(lambda: self.state.solve_head(data_of(spoil), callback=spoil.callback))
        return [checksum(state.params), solution.status.name]

    def variables(self) -> Any:
        return self.state, X, Y

    def is_right(self, value: Value, spoil: Spoil, damaged: bool) -> bool:
        gone_back = [checksum(self.state.guard.kept["params"]), "rejected"]
        return value == self.reference or (spoil.nan is not None and value == gone_back)


class Solve(_InMemory):
    """A network on arrays, in blocks or whole."""

    name = "cf.Cronos.solve"

    def run(self, directory: Path, spoil: Spoil) -> Value:

        class Blocks:
            def __iter__(self) -> Any:
                return (x for x, _ in Loader(BATCHES, spoil))

        rows = data_of(spoil)[0] if spoil.arrays else Blocks()
        solution, _ = told(lambda: solver().solve(rows, Y, hidden=6, callback=spoil.callback))
        return checksum(solution.params)


class FitNnx(_InMemory):
    """The head of an NNX model, which is changed in place: all of it, or nothing."""

    name = "cf.nnx.fit_head"

    @functools.cached_property
    def model(self) -> Any:
        """The model as it is before a call."""
        from flax import nnx

        rngs = nnx.Rngs(0)
        layers = [nnx.Linear(5, 8, rngs=rngs), nnx.leaky_relu, nnx.Linear(8, 6, rngs=rngs), nnx.relu]
        return nnx.Sequential(*layers, nnx.Linear(6, 2, rngs=rngs))

    @functools.cached_property
    def head(self) -> Any:
        """Its head."""
        import cronos_flax as cf

        return cf.nnx.find_head(self.model, X[:ROWS])

    def fresh(self) -> Any:
        """What a call is given; its state must be as before after an error."""
        from flax import nnx

        return nnx.clone(self.model)

    def call(self, given: Any, spoil: Spoil) -> str:
        """The call; what it says."""
        import cronos_flax as cf

        cf.nnx.fit_head(self.head, given, data_of(spoil), solver=solver(), callback=spoil.callback)
        return "solved"

    def run(self, directory: Path, spoil: Spoil) -> Value:
        from flax import nnx

        given = self.fresh()
        before = checksum(nnx.as_pure(nnx.state(given)))
        try:
            said, _ = told(lambda: self.call(given, spoil))
        except BaseException:
            if checksum(nnx.as_pure(nnx.state(given))) != before:
                return "changed by a call that raised"
            raise
        return [self.of_model(given), said]

    def of_model(self, given: Any) -> int:
        """The checksum of the model's state."""
        from flax import nnx

        return checksum(nnx.as_pure(nnx.state(given)))


class SolveNnx(FitNnx):
    """CRONOS-AM in NNX, after a first solve."""

    name = "cf.nnx.CronosOptimizer.solve_head"

    @functools.cached_property
    def alternating(self) -> Any:
        """Model and optimizer after a solve."""
        import optax
        from flax import nnx

        import cronos_flax as cf

        model = nnx.clone(self.model)
        optimizer = cf.nnx.CronosOptimizer(model, optax.adam(1e-2), head=self.head, solver=solver())
        optimizer.solve_head(model, Loader(BATCHES, Spoil()), callback=lambda _: None)
        return nnx.List([model, optimizer])

    def fresh(self) -> Any:
        from flax import nnx

        return nnx.clone(self.alternating)

    def call(self, given: Any, spoil: Spoil) -> str:
        model, optimizer = given
        return optimizer.solve_head(model, data_of(spoil), callback=spoil.callback).status.name

    def is_right(self, value: Value, spoil: Spoil, damaged: bool) -> bool:
        gone_back = [self.of_model(self.alternating), "rejected"]
        return value == self.reference or (spoil.nan is not None and value == gone_back)

    def of_model(self, given: Any) -> int:
        return super().of_model(given[0])
