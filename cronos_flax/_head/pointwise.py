"""Layers that are functions of the last axis alone, as a head is, and those that are not."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

_CONVOLUTIONS = nn.Conv, nn.ConvTranspose, nn.ConvLocal, nnx.Conv, nnx.ConvTranspose
_LINEAR = nn.DenseGeneral, nnx.LinearGeneral
_LOOKUPS = nn.Embed, nnx.Embed
_SEQUENCES = (
    *(nn.MultiHeadDotProductAttention, nn.RNN, nn.Bidirectional, nn.RNNCellBase),
    *(nnx.MultiHeadAttention, nnx.RNN, nnx.Bidirectional, nnx.nn.recurrent.RNNCellBase),
)
_OF_ONE = "kernel_size", "strides", "input_dilation", "kernel_dilation", "feature_group_count"


def is_pointwise(layer: Any) -> bool:
    """Whether a layer is a convolution that is a Dense on the last axis: 1×1, without strides, dilation or groups."""
    return isinstance(layer, nn.Conv | nnx.Conv) and not _more(layer)


def check_replaceable(layer: Any, at: str, dense: str, is_pooled: bool, axes: int | None = None) -> None:
    """Raise a ValueError for a layer of Flax in whose place a head, a function of the last axis, would be another.

    Args:
        layer: the layer to be replaced.
        at: its path, for the message.
        dense: the name of a fully connected layer.
        is_pooled: whether the user makes the head's input, and so says what the head sees.
        axes: how many axes the layer's input has; None where it is not known.
    """
    more = _more(layer, axes)
    if not more or (is_pooled and not isinstance(layer, _LOOKUPS)):
        return
    advice = "Give the path of another layer, or leave `at` out: the head then comes after the model's output"
    if isinstance(layer, _CONVOLUTIONS):
        advice += "; or give the head's input by `pool`, such as jax.lax.conv_general_dilated_patches"
    raise ValueError(
        f"graft: `at` must be the path of a layer that is a function of the last axis, as {dense} is, got {at}, "
        f"{_article(type(layer).__name__)} {more}. {advice}."
    )


def check_features(x: Any) -> None:
    """Raise a ValueError for what a grafted head cannot take: several outputs of a model, or numbers."""
    if not hasattr(x, "ndim") or x.ndim < 1:
        shapes = jax.tree.map(jnp.shape, x)
        raise ValueError(
            f"graft: the input of the head must be one array (..., p), got {shapes}. Make it with pool=: of a model "
            "with several outputs, pool=lambda out, *args, **kwargs: out[key]."
        )


def _article(name: str) -> str:
    return f"{'an' if name[:1] in 'AEIOU' else 'a'} {name}"


def _more(layer: Any, axes: int | None = None) -> str:
    """What a layer of Flax is besides a function of the last axis, in words; empty for others."""
    if isinstance(layer, _LOOKUPS):
        return "that looks up a row for each integer"
    if isinstance(layer, _SEQUENCES):
        return "that works on a sequence"
    settings: dict[str, Any] = {}
    if isinstance(layer, _LINEAR):
        batch = getattr(layer, "batch_dims", ()) or getattr(layer, "batch_axis", ())
        is_last = jax.tree.leaves(layer.axis) in ([-1], [axes and axes - 1])
        settings = {} if is_last else {"axis": layer.axis}
        settings |= {"batch axes": tuple(batch)} if batch else {}
    elif isinstance(layer, _CONVOLUTIONS):
        given = {name: getattr(layer, name, 1) for name in _OF_ONE}
        settings = {name: value for name, value in given.items() if {*jax.tree.leaves(value)} - {1}}
        if not isinstance(layer.padding, str) and {*jax.tree.leaves(layer.padding)} - {0}:
            settings["padding"] = layer.padding
        if isinstance(layer, nn.ConvLocal):
            settings["weights"] = "those of each place"
    return f"with {', '.join(f'{name}={value}' for name, value in settings.items())}" if settings else ""
