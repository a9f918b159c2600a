"""How a round is executed: one client after another, or many at once. Same numbers from each."""

from fedmerge.runtime.engines import Engine, Folded, Sequential, Vectorised
from fedmerge.runtime.rounds import (
    BufferPolicy,
    Fleet,
    Meeting,
    RoundResult,
    finetuned,
    first_fleet,
    personal_models,
    run_round,
    score,
)

__all__ = [
    "BufferPolicy",
    "Engine",
    "Fleet",
    "Folded",
    "Meeting",
    "RoundResult",
    "Sequential",
    "Vectorised",
    "finetuned",
    "first_fleet",
    "personal_models",
    "run_round",
    "score",
]
