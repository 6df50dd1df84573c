"""The methods of a comparison: which there are, and their grids of rates.

CRONOS-AM; the head solved on a frozen backbone, and a linear probe of the same features, alone or as the start of
training; and Optax optimizers.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from flax.training.train_state import TrainState
from jax import Array

from cronos_flax._alternation.backbone import rated
from cronos_flax._alternation.defaults import DECAYS
from cronos_flax._solver.transfer import on_device

ALTERNATION, STRICT, FROZEN, PROBE = "cronos-am", "cronos-am-strict", "cronos", "linear-probe"
SOLVED_FIRST, PROBED_FIRST = "cronos-ft", "lp-ft"

BACKBONE, BACKBONE_RATE = "adam", 3e-3  # of CRONOS-AM without a search
_WEIGHT_DECAY = 1e-4
PROBE_DECADES = (-3.0, 3.0)


class Baseline(NamedTuple):
    """An optimizer as a function of its rate, and its grid: the exponents of ten of the lowest and highest rate.

    ``usual`` is the rate that users take without a search, where there is one. ``evaluate(opt_state, params)`` gives
    the parameters to evaluate, where these are not the ones trained.
    """

    make: Callable[[float | Array], optax.GradientTransformation]
    low: float
    high: float
    usual: float | None = None
    evaluate: Callable[[Any, Any], Any] | None = None


BASELINES = {
    "adam": Baseline(optax.adam, -4.5, -1.5, 1e-3),
    "adamw": Baseline(lambda rate: optax.adamw(rate, weight_decay=_WEIGHT_DECAY), -4.5, -1.5, 1e-3),
    "nadamw": Baseline(lambda rate: optax.nadamw(rate, weight_decay=_WEIGHT_DECAY), -4.5, -1.5, 1e-3),
    "sgd": Baseline(lambda rate: optax.sgd(rate, momentum=0.9), -3.5, -0.5),
    "yogi": Baseline(optax.yogi, -4, -1),
    "muon": Baseline(optax.contrib.muon, -3.5, -0.5),
    # The next two find a rate themselves; theirs here is a factor on it, 1 by default.
    "dadapt_adamw": Baseline(lambda rate: optax.contrib.dadapt_adamw(rate, weight_decay=_WEIGHT_DECAY), -1.5, 1.5, 1.0),
    "prodigy": Baseline(optax.contrib.prodigy, -1.5, 1.5, 1.0),
    "mechanize": Baseline(
        lambda rate: optax.contrib.mechanize(optax.adamw(rate, weight_decay=_WEIGHT_DECAY)), -4.5, -1.5
    ),
    "schedule_free_adamw": Baseline(
        lambda rate: optax.contrib.schedule_free_adamw(rate, weight_decay=_WEIGHT_DECAY),
        -4,
        -1,
        None,
        optax.contrib.schedule_free_eval_params,
    ),
}
METHODS = (ALTERNATION, SOLVED_FIRST, STRICT, FROZEN, PROBE, PROBED_FIRST, *BASELINES)
_ALTERNATING = (ALTERNATION, SOLVED_FIRST, STRICT)  # kinds that solve for the head between steps
_NO_DECAY = "schedule_free_adamw"  # averages in the place of a schedule


class Parts(NamedTuple):
    """What the name of a method says: ``KIND``, ``KIND:OPTIMIZER`` or ``OPTIMIZER``, and ``+DECAY``."""

    kind: str | None  # an alternation, or what comes before the gradient steps; None for an optimizer alone
    optimizer: str | None  # None for the usual one of an alternation
    decay: str | None

    @property
    def alternates(self) -> bool:
        """Whether the head is solved for between gradient steps."""
        return self.kind in _ALTERNATING


def parts_of(method: str) -> Parts:
    """The parts of the name of a method that trains by gradient steps."""
    rest, _, decay = method.partition("+")
    kind, _, name = rest.rpartition(":")
    if rest in (*_ALTERNATING, PROBED_FIRST):
        kind, name = rest, BACKBONE if rest == PROBED_FIRST else ""
    return Parts(kind or None, name or None, decay or None)


def check_method(method: str) -> str:
    """Return the method if it exists.

    Raises:
        ValueError: if it does not; the message lists those that do.
    """
    parts, decays = parts_of(method), [name for name in DECAYS if name is not None]
    exists = method in METHODS or (
        parts.optimizer in BASELINES
        and parts.kind in (None, *_ALTERNATING, PROBED_FIRST)
        and (parts.decay is None or (not parts.alternates and parts.decay in decays and parts.optimizer != _NO_DECAY))
        and not method.endswith("+")
    )
    if not exists:
        raise ValueError(
            f"`methods` must be of {', '.join(METHODS)}, or KIND:OPTIMIZER with one of "
            f"{', '.join((*_ALTERNATING, PROBED_FIRST))} and one of the optimizers, or OPTIMIZER+DECAY, or "
            f"{PROBED_FIRST}:OPTIMIZER+DECAY, with {', '.join(decays)} (not for {_NO_DECAY}), got {method!r}."
        )
    return method


def has_head(method: str) -> bool:
    """Whether a method needs to know the head of the model; an optimizer alone does not."""
    return method in (FROZEN, PROBE) or parts_of(method).kind is not None


def grid(method: str, rates: int, span: tuple[float, float] | None = None, random: int | None = None) -> list[Any]:
    """The rates that a method is run at.

    Args:
        method: as :func:`check_method` takes it.
        rates: how many.
        span: the lowest and the highest rate; None for the three decades that are usual for the method.
        random: a seed: rates are drawn, uniformly in their logarithm, instead of spaced.

    Returns:
        Rates in increasing order; ``[None]`` for a method without a rate to search.
    """
    name = parts_of(method).optimizer
    if name is None or name == FROZEN:
        return [None]
    low, high = PROBE_DECADES if name == PROBE else BASELINES[name][1:3]
    if span is not None and name != PROBE:
        low, high = (math.log10(rate) for rate in span)
    if random is not None:
        exponents = np.sort(np.random.default_rng(random).uniform(low, high, rates))
    else:
        exponents = np.linspace(low, high, rates) if rates > 1 else np.asarray([(low + high) / 2])
    return [float(f"{10**exponent:.3g}") for exponent in exponents]


@functools.cache
def optimizer(name: str, decays: bool = False) -> optax.GradientTransformation:
    """The optimizer of this name, its rate in its state: one object for all rates, so its step is compiled once."""

    def make(rate: float | Array) -> optax.GradientTransformation:
        return BASELINES[name].make(rate)

    tx = optax.inject_hyperparams(make)(rate=1.0)
    return rated(tx) if decays else tx


def at_rate(state: TrainState, rate: float) -> Any:
    """A state of an :func:`optimizer` before its first step, at this rate."""
    new = {"rate": on_device(rate, jnp.float32)}

    def replaced(part: Any) -> Any:  # by name alone, moments of a parameter "rate" would be replaced too
        return part._replace(hyperparams=part.hyperparams | new) if _has_rate(part) else part

    return state.replace(opt_state=jax.tree.map(replaced, state.opt_state, is_leaf=_has_rate))


def _has_rate(part: Any) -> bool:
    return isinstance(part, optax.InjectStatefulHyperparamsState)


@functools.cache
def evaluated(name: str) -> Callable[[Any, Any], Any] | None:
    """What gives the parameters to evaluate from the state of an :func:`optimizer` and those that are trained."""
    evaluate = BASELINES[name].evaluate
    return None if evaluate is None else lambda opt_state, params: evaluate(opt_state.inner_state, params)


class BaselineState(TrainState):
    """Flax's ``TrainState`` with collections, parameters to evaluate that differ from those trained, and a decay.

    Args:
        model_state: the module's other collections.
        evaluate: gives the parameters to evaluate; None for those that are trained.
        run_decay: how ``cf.train`` lets the rate fall, if ``tx`` is :func:`rated`; None for a rate that stays.
    """

    model_state: Any = struct.field(default_factory=dict)
    evaluate: Callable[[Any, Any], Any] | None = struct.field(pytree_node=False, default=None)
    run_decay: str | None = struct.field(pytree_node=False, default=None)

    @property
    def eval_params(self) -> Any:
        """Parameters to evaluate; None for ``params``."""
        return None if self.evaluate is None else self.evaluate(self.opt_state, self.params)
