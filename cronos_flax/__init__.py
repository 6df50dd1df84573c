"""CRONOS for Flax: convex training of the last two layers of any Flax module."""

from cronos_flax import nnx as nnx
from cronos_flax._checkpoint import restore_checkpoint as restore_checkpoint
from cronos_flax._checkpoint import save_checkpoint as save_checkpoint
from cronos_flax._cronos import Cronos as Cronos
from cronos_flax._driver import train as train
from cronos_flax._fit import prune_head as prune_head
from cronos_flax._graft import graft as graft
from cronos_flax._graft import graft_variables as graft_variables
from cronos_flax._guard import Guard as Guard
from cronos_flax._head import Head as Head
from cronos_flax._head import find_head as find_head
from cronos_flax._head import fit_head as fit_head
from cronos_flax._linsolve import NystromPCG as NystromPCG
from cronos_flax._linsolve import Structured as Structured
from cronos_flax._losses import Huber as Huber
from cronos_flax._losses import Loss as Loss
from cronos_flax._losses import signed_targets as signed_targets
from cronos_flax._solution import Solution as Solution
from cronos_flax._solution import Stats as Stats
from cronos_flax._solution import Status as Status
from cronos_flax._solution import TwoLayer as TwoLayer
from cronos_flax._train_state import CronosTrainState as CronosTrainState
from cronos_flax._train_state import backbone_only as backbone_only
from cronos_flax._weights import predict as predict
