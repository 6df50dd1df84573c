"""The squared loss, and the targets that turn labels into something it can fit."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float

from cronos_flax._types import Outputs, RowVector


def squared(outputs: Outputs, targets: Outputs) -> RowVector:
    """``½‖f − y‖²`` of each row."""
    return 0.5 * jnp.sum(jnp.square(outputs - targets), axis=1)


def signed_targets(labels: ArrayLike, num_classes: int) -> Float[Array, "n C"]:
    """Targets ±1 for the squared loss: +1 for the row's own class, −1 for the others.

    Two classes need one column only, ``+1`` for class 1 and ``−1`` for class 0.

    Args:
        labels: integers in ``[0, num_classes)``, any shape ``(...)``.
        num_classes: number of classes, at least 2.

    Returns:
        Shape ``(..., num_classes)``, or ``(..., 1)`` for two classes.

    Raises:
        ValueError: for labels that are not integers or out of range, or fewer than two classes.

    Example:
        >>> import cronos_flax as cf
        >>> cf.signed_targets([0, 2], 3).tolist()
        [[1.0, -1.0, -1.0], [-1.0, -1.0, 1.0]]
        >>> cf.signed_targets([0, 1], 2).tolist()
        [[-1.0], [1.0]]
    """
    if isinstance(num_classes, bool) or not isinstance(num_classes, (int, np.integer)) or num_classes < 2:
        raise ValueError(f"signed_targets: `num_classes` must be an integer ≥ 2, got {num_classes!r}.")
    if not isinstance(labels, (Array, np.ndarray)):
        labels = np.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"signed_targets: `labels` must be integers, got dtype {labels.dtype}.")
    labels = jnp.asarray(labels)
    if not isinstance(labels, jax.core.Tracer) and labels.size:
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= num_classes:
            raise ValueError(
                f"signed_targets: `labels` must lie in [0, {num_classes}), got values from {low} to {high}."
            )
    classes = jnp.arange(1 if num_classes == 2 else 0, num_classes)
    return jnp.where(labels[..., None] == classes, 1.0, -1.0)
