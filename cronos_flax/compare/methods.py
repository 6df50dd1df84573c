"""What CRONOS-AM is compared with: Optax optimizers over grids of rates that fit them, and a linear probe."""

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import optax
from flax import struct
from flax.training.train_state import TrainState
from scipy.special import log_softmax
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge

_WEIGHT_DECAY = 1e-4


class Baseline(NamedTuple):
    """An optimizer of its rate, and the decades that its grid of rates spans.

    ``evaluate`` gives the parameters to be evaluated, of the optimizer's state and the parameters.
    """

    make: Callable[[float], optax.GradientTransformation]
    low: float
    high: float
    evaluate: Callable[[Any, Any], Any] | None = None


BASELINES = {
    "adam": Baseline(optax.adam, -4.5, -1.5),
    "adamw": Baseline(lambda rate: optax.adamw(rate, weight_decay=_WEIGHT_DECAY), -4.5, -1.5),
    "sgd": Baseline(lambda rate: optax.sgd(rate, momentum=0.9), -3.5, -0.5),
    "yogi": Baseline(optax.yogi, -4, -1),
    "muon": Baseline(optax.contrib.muon, -3.5, -0.5),
    # Of the following the rate is a factor on what they find themselves, one by default.
    "dadapt_adamw": Baseline(lambda rate: optax.contrib.dadapt_adamw(rate, weight_decay=_WEIGHT_DECAY), -1.5, 1.5),
    "prodigy": Baseline(optax.contrib.prodigy, -1.5, 1.5),
    "mechanize": Baseline(
        lambda rate: optax.contrib.mechanize(optax.adamw(rate, weight_decay=_WEIGHT_DECAY)), -4.5, -1.5
    ),
    "schedule_free_adamw": Baseline(
        lambda rate: optax.contrib.schedule_free_adamw(rate, weight_decay=_WEIGHT_DECAY),
        -4,
        -1,
        optax.contrib.schedule_free_eval_params,
    ),
}


@functools.lru_cache(maxsize=64)
def optimizer(name: str, rate: float) -> optax.GradientTransformation:
    """The optimizer of this name; the same object each time, so that its step is compiled once."""
    return BASELINES[name].make(rate)


class BaselineState(TrainState):
    """Flax's ``TrainState`` with collections, and with parameters that are evaluated in place of those trained.

    Args:
        model_state: the module's other collections.
        evaluate: gives these parameters; None for those that are trained.
    """

    model_state: Any = struct.field(default_factory=dict)
    evaluate: Callable[[Any, Any], Any] | None = struct.field(pytree_node=False, default=None)

    @property
    def eval_params(self) -> Any:
        """Parameters to evaluate; None for ``params``."""
        return None if self.evaluate is None else self.evaluate(self.opt_state, self.params)


def linear_probe(
    features: np.ndarray, y: np.ndarray, strength: float, *, regression: bool
) -> Callable[[np.ndarray], np.ndarray]:
    """Scikit-learn's linear model on features; returns its outputs: values, or log-probabilities by class.

    Args:
        features: of the rows to fit, ``(n, p)``.
        y: labels or values, ``(n,)``.
        strength: the inverse of the regularisation, C of ``LogisticRegression``, 1/α of ``Ridge``.
        regression: whether y are values.
    """
    if regression:
        ridge = Ridge(alpha=1 / strength).fit(features, y)
        return lambda x: ridge.predict(x)[:, None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        logistic = LogisticRegression(C=strength, max_iter=500).fit(features, y)

    def log_probabilities(x: np.ndarray) -> np.ndarray:
        scores = logistic.decision_function(x)
        scores = scores if scores.ndim == 2 else np.stack([np.zeros_like(scores), scores], axis=1)
        return log_softmax(scores, axis=1)

    return log_probabilities
