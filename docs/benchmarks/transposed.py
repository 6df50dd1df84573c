"""Products with the transpose of many rows: as XLA orders them, and with the narrow matrix on the left.

    python docs/benchmarks/transposed.py

Milliseconds on the CPU, median of nine, compiled as the solver's programs are. Half a minute.
"""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from cronos_flax._solver import staging
from cronos_flax._solver.blocks import adjoint

SHAPES = ((60_000, 785, 1), (60_000, 785, 16), (60_000, 785, 64), (10_000, 385, 48), (20_000, 256, 77), (6000, 20, 512))


def milliseconds(product: Callable[..., jax.Array], X: jax.Array, R: jax.Array) -> float:
    """Of one product, compiled before."""
    call, taken = jax.jit(product, compiler_options=staging._OPTIMISED), []
    for _ in range(10):
        began = time.perf_counter()
        jax.block_until_ready(call(X, R))
        taken.append(time.perf_counter() - began)
    return 1e3 * float(np.median(taken[1:]))


def main() -> None:
    """Print the table."""
    print("| n | d | k | Xᵀ R | the solver's | ratio |", "|---" * 6 + "|", sep="\n")
    rng = np.random.default_rng(0)
    for n, d, k in SHAPES:
        X, R = (jnp.asarray(rng.normal(size=(n, columns)).astype("float32")) for columns in (d, k))
        plain, ours = milliseconds(lambda X, R: X.T @ R, X, R), milliseconds(adjoint, X, R)
        print(f"| {n:,} | {d} | {k} | {plain:.2f} | {ours:.2f} | {plain / ours:.1f} |", flush=True)


if __name__ == "__main__":
    main()
