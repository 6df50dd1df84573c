"""CRONOS for Flax: convex training of the last two layers of any Flax module."""

from cronos_flax import nnx as nnx
from cronos_flax._alternation.backbone import backbone_only as backbone_only
from cronos_flax._alternation.checkpoint import restore_checkpoint as restore_checkpoint
from cronos_flax._alternation.checkpoint import save_checkpoint as save_checkpoint
from cronos_flax._alternation.defaults import Alternation as Alternation
from cronos_flax._alternation.guard import Guard as Guard
from cronos_flax._alternation.guard import GuardState as GuardState
from cronos_flax._alternation.train import train as train
from cronos_flax._alternation.train_state import CronosTrainState as CronosTrainState
from cronos_flax._head.features import Features as Features
from cronos_flax._head.fit import prune_head as prune_head
from cronos_flax._head.gather import gather_features as gather_features
from cronos_flax._head.graft import graft as graft
from cronos_flax._head.graft import graft_variables as graft_variables
from cronos_flax._head.head import Head as Head
from cronos_flax._head.linen import find_head as find_head
from cronos_flax._head.linen import fit_head as fit_head
from cronos_flax._solver.cronos import Cronos as Cronos
from cronos_flax._solver.linear_solvers import NystromPCG as NystromPCG
from cronos_flax._solver.linear_solvers import Structured as Structured
from cronos_flax._solver.loss import Loss as Loss
from cronos_flax._solver.loss import signed_targets as signed_targets
from cronos_flax._solver.losses import Huber as Huber
from cronos_flax._solver.settings import Held as Held
from cronos_flax._solver.settings import Refreshed as Refreshed
from cronos_flax._solver.solution import GatedTwoLayer as GatedTwoLayer
from cronos_flax._solver.solution import Solution as Solution
from cronos_flax._solver.solution import Stats as Stats
from cronos_flax._solver.solution import Status as Status
from cronos_flax._solver.solution import TwoLayer as TwoLayer
from cronos_flax._solver.solution import predict as predict

__all__ = [
    "Alternation",
    "Cronos",
    "CronosTrainState",
    "Features",
    "GatedTwoLayer",
    "Guard",
    "GuardState",
    "Head",
    "Held",
    "Huber",
    "Loss",
    "NystromPCG",
    "Refreshed",
    "Solution",
    "Stats",
    "Status",
    "Structured",
    "TwoLayer",
    "backbone_only",
    "find_head",
    "fit_head",
    "gather_features",
    "graft",
    "graft_variables",
    "nnx",
    "predict",
    "prune_head",
    "restore_checkpoint",
    "save_checkpoint",
    "signed_targets",
    "train",
]
