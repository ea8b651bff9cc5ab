"""Optimizers that torch lacks, a file each; a configuration names them by their class."""

import torch

from experiments.training.optimizers.evaluation import answering, is_schedule_free
from experiments.training.optimizers.frozen_adam import FrozenAdam
from experiments.training.optimizers.lars import LARS
from experiments.training.optimizers.levenberg_marquardt import LevenbergMarquardt
from experiments.training.optimizers.muon_adam import MuonAdam
from experiments.training.optimizers.ss_broyden import SSBroyden

LINE_SEARCHES = (torch.optim.LBFGS, SSBroyden)
"""Optimizers that evaluate the closure several times in a step, at most `max_eval` of their group."""

__all__ = [
    "LARS",
    "LINE_SEARCHES",
    "FrozenAdam",
    "LevenbergMarquardt",
    "MuonAdam",
    "SSBroyden",
    "answering",
    "is_schedule_free",
]
