"""Dimension letters and array aliases, said once.

======  ==========================================================================
letter  meaning
======  ==========================================================================
``n``   examples (rows)
``p``   features as the user gives them
``d``   features as the solver sees them: ``p``, plus one for the constant column
        that carries the hidden bias
``m``   hidden neurons
``C``   outputs
======  ==========================================================================

The arrays of one solve share one floating dtype: float32, or float64 where JAX's x64 mode is on.
"""

from typing import TypeAlias

from jax import Array
from jaxtyping import Bool, Float

Scalar: TypeAlias = Float[Array, ""]
RowVector: TypeAlias = Float[Array, " n"]
Design: TypeAlias = Float[Array, "n d"]
Outputs: TypeAlias = Float[Array, "n C"]
Gates: TypeAlias = Bool[Array, "n m"]
Activations: TypeAlias = Float[Array, "n m"]
Neurons: TypeAlias = Float[Array, "d m"]
Directions: TypeAlias = Float[Array, "m C"]
Bias: TypeAlias = Float[Array, " C"] | None  # None for a network without output bias
