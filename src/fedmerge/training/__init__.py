"""Local training on a flat vector: a task is a network and a loss; batches are drawn by counter."""

from fedmerge.training.batches import LocalTraining, Planned, draw_batches, one_pass, rate_of_round, step_sizes
from fedmerge.training.scores import Tally, tally
from fedmerge.training.sgd import Descent
from fedmerge.training.task import FunctionalTask, ModuleTask, is_batch_coupled

__all__ = [
    "Descent",
    "FunctionalTask",
    "LocalTraining",
    "ModuleTask",
    "Planned",
    "Tally",
    "draw_batches",
    "is_batch_coupled",
    "one_pass",
    "rate_of_round",
    "step_sizes",
    "tally",
]
