"""Optimizers of float16 parameters: a small number that keeps them from dividing by zero may be zero there."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from cronos_flax._solver.checks import all_finite
from cronos_flax._solver.user_warnings import warn


def warn_of_float16(where: str, tx: optax.GradientTransformation, params: Any, grads: Any) -> None:
    """Warn if an optimizer turns a gradient of zero into NaN, as Adam does in float16 with its usual ``eps``.

    Args:
        where: the caller's name.
        tx: the optimizer; it is tried only on float16 parameters.
        params: the parameters.
        grads: a tree of the structure and dtypes that gradients have.
    """
    if not any(jnp.result_type(leaf) == jnp.float16 for leaf in jax.tree.leaves(grads)):
        return

    @jax.jit
    def updates(params: Any, grads: Any) -> Any:
        still = jax.tree.map(jnp.zeros_like, grads)
        return tx.update(still, tx.init(params), params, value=jnp.float32(1))[0]

    try:
        with jax.transfer_guard("allow"), jax.debug_nans(False):  # Optax makes its constants on the host
            made = updates(params, grads)
    except Exception:  # an optimizer that needs more than is given here is refused at its first step
        return
    if not all_finite(made):
        warn(
            f"{where}: `tx` turns a gradient of zero into NaN, as some parameters are float16: there the eps of Adam, "
            "1e-8, is zero, and so is the square of a gradient below 2e-4. Keep parameters in float32, and compute in "
            "half precision if you like (param_dtype=jnp.float32, dtype=jnp.float16); or take bfloat16; or give an eps "
            "that float16 has, as optax.adam(1e-3, eps=1e-4)."
        )
