"""How a round is executed: one client after another, or many at once. Same numbers from each."""

from fedmerge.runtime.engines import Engine, Sequential, Vectorised
from fedmerge.runtime.rounds import BufferPolicy, Fleet, RoundResult, finetuned, personal_models, run_round, score

__all__ = [
    "BufferPolicy",
    "Engine",
    "Fleet",
    "RoundResult",
    "Sequential",
    "Vectorised",
    "finetuned",
    "personal_models",
    "run_round",
    "score",
]
