"""A picture of ``beta="path"``: the loss on held-out rows against the weight decay."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from cronos_flax._solver.solution import Stats
from cronos_flax.compare import style


def draw(stats: Stats, path: str | Path) -> Figure:
    """Save the mean loss on held-out rows at each weight decay that was tried, and mark the one that was chosen.

    Args:
        stats: ``solution.stats`` of a solve with ``beta="path"``.
        path: of the picture, a PNG file.

    Returns:
        The figure, saved.

    Raises:
        ValueError: if β was not chosen on a path.
    """
    if stats.path_betas is None or stats.path_losses is None:
        raise ValueError('draw: `stats` must be of a solve with beta="path", got those of a solve with one β.')
    betas, losses, chosen = np.asarray(stats.path_betas), np.asarray(stats.path_losses), float(stats.beta)
    there = int(np.argmin(np.abs(np.log(betas / chosen))))
    with style.styled(5.4, 3.6) as figure:
        ax = figure.subplots()
        ax.plot(betas, losses, "o-", color=style.OURS, markersize=5)
        ax.plot(betas[there], losses[there], "*", color=style.OTHER, markersize=14)
        ax.annotate(
            f"β = {chosen:.2g}", (betas[there], losses[there]), (0, -18), textcoords="offset points", ha="center"
        )
        ax.set_xscale("log")
        ax.margins(y=0.2)
        ax.set(xlabel="weight decay β", ylabel="mean loss on held-out rows", title="The path of β")
        style.save(figure, Path(path))
    return figure
