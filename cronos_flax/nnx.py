"""Heads and CRONOS-AM for Flax NNX, by their public names; each is documented where it is defined."""

from cronos_flax._alternation.nnx import CronosOptimizer as CronosOptimizer
from cronos_flax._alternation.nnx_state import CronosTrainState as CronosTrainState
from cronos_flax._alternation.nnx_state import TrainState as TrainState
from cronos_flax._head.head import Head as Head
from cronos_flax._head.nnx import find_head as find_head
from cronos_flax._head.nnx import fit_head as fit_head
from cronos_flax._head.nnx_graft import Grafted as Grafted
from cronos_flax._head.nnx_graft import TwoLayerHead as TwoLayerHead
from cronos_flax._head.nnx_graft import graft as graft

__all__ = [
    "CronosOptimizer",
    "CronosTrainState",
    "Grafted",
    "Head",
    "TrainState",
    "TwoLayerHead",
    "find_head",
    "fit_head",
    "graft",
]
