"""Features gathered by themselves, to be solved on more than once."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from cronos_flax._head.cache import from_cache
from cronos_flax._head.data import UserData
from cronos_flax._head.features import Features
from cronos_flax._head.files import check_path
from cronos_flax._head.head import Head
from cronos_flax._head.rows import InMemory


def gather_features(
    head: Head,
    variables: Any,
    data: Any,
    *,
    unpack: Callable[[Any], tuple] | None = None,
    cache: str | Path | None = None,
    renew: bool = False,
    callback: Callable[[dict[str, float]], Any] | None = None,
) -> Features:
    """The head's input for all rows of ``data``, gathered once for many solves: linen and NNX.

    Give the result to ``fit_head`` or ``solve_head`` as ``data``, for heads of other widths, seeds or solvers too: each
    costs its solve only. Its arrays go into :meth:`cronos_flax.Cronos.solve`.

    With a ``cache`` the features are in files, and memory holds one batch of them, besides targets and weights. A pass
    that was killed goes on where it was. Another call, in another process too, reads the data and compares them with
    checksums, passes the first batch, and takes the rest from the files. A solve takes the features into
    memory if they are no more than ``max_bytes`` of :class:`cronos_flax.Cronos`, and reads larger ones in blocks.

    Args:
        head: from :func:`cronos_flax.find_head` or :func:`cronos_flax.nnx.find_head`.
        variables: the variables of the linen module, or the NNX model.
        data: as for :func:`cronos_flax.fit_head`. With a ``cache`` it must be re-iterable, and give the same batches
            each time: no shuffling, no augmentation.
        unpack: how to take a batch apart, as for :func:`cronos_flax.fit_head`.
        cache: a directory for the files, ``4 n p`` bytes for n rows of p features in float32, and twice that until the
            end; it is made if it does not exist. None keeps features in memory.
        renew: what to do with a cache that does not fit: of a backbone with other parameters, running statistics or
            code; of other data; or damaged. False raises, True makes it anew. One that fits is used in both cases.
        callback: called after each batch with ``{"rows", "seconds"}``, those of this call.

    Returns:
        The :class:`cronos_flax.Features`. Its rows are sorted by target: use its ``X`` with its ``y``, and not with the
        targets of ``data``.

    Raises:
        ValueError: for data that do not fit the module, or each other; for a cache that does not fit, with the reason;
            where there are several processes.
        MemoryError: if there is no cache, and memory does not hold the features.
        BlockingIOError: if another process is gathering into the cache.

    Example:
        >>> import jax, flax.linen as nn, cronos_flax as cf
        >>> model = nn.Sequential([nn.Dense(8), nn.tanh, nn.Dense(16), nn.relu, nn.Dense(3)])
        >>> x = jax.random.normal(jax.random.key(0), (32, 5))
        >>> variables, y = model.init(jax.random.key(1), x), x[:, 0].argsort() % 3
        >>> cf.gather_features(cf.find_head(model, variables, x), variables, (x, y))
        Features: 32 rows of 8 float32
    """
    where = "gather_features"
    if not isinstance(head, Head):
        raise ValueError(f"{where}: `head` must come from cf.find_head or cf.nnx.find_head, got {type(head).__name__}.")
    if isinstance(data, Features):
        raise ValueError(f"{where}: `data` are features already. Give them to fit_head.")
    if jax.process_count() > 1:
        raise ValueError(
            f"{where}: there must be one process, which keeps the features, got {jax.process_count()}. Give the data "
            "to fit_head or solve_head, where each process keeps the rows of its own devices."
        )
    if cache is not None:
        check_path(where, "cache", cache)
    backbone = head.backbone(variables, where)
    given = UserData(data, unpack, where)
    passed = functools.partial(head.passed, variables, given, callback=callback)
    if cache is None:
        rows, order, moments = passed(store=InMemory())
    else:
        given.check(repeatable=True)
        rows, order, moments = from_cache(Path(cache), renew, lambda store: passed(store=store), backbone)
    return Features(rows.X, rows.y, rows.weight, order, rows.finite, backbone, moments, head.operations)
