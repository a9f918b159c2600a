"""How much one client's updates tell of one of its examples (training options `dp_clip` and `dp_noise`)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedmerge.core.errors import UsageError
from fedmerge.privacy.accounting import epsilon
from fedmerge.training import LocalTraining


def example_epsilon(training: LocalTraining, num_examples: int, rounds: int, delta: float) -> float:
    """Epsilon of one example of a client that takes part in `rounds` rounds; infinite without `dp_noise`.

    Whoever sees all of the client's updates learns no more than that. How many examples the client has is not
    protected, and a client that is drawn by chance is not counted as less: it knows when it takes part.

    Args:
        training: The run's.
        num_examples: Training examples of the client.
        rounds: It takes part in, at most.
        delta: For which epsilon is told.

    Raises:
        UsageError: if training does not protect examples.
    """
    if training.dp_clip is None or training.dp_noise is None:
        raise UsageError(
            "training.dp_clip: got none; expected dp_clip and dp_noise: examples are not protected without them"
        )
    rate = training.expected(num_examples) / num_examples
    return epsilon(training.dp_noise, rate, rounds * training.private_steps(num_examples), delta)


def example_epsilons(
    training: LocalTraining, num_examples: Sequence[int], rounds: int, delta: float
) -> tuple[float, ...]:
    """`example_epsilon` of every client, computed once for each number of examples; infinity where there are none.

    Args:
        training: The run's.
        num_examples: [N].
        rounds: In which a client takes part, at most.
        delta: For which epsilon is told.
    """
    found = {n: example_epsilon(training, n, rounds, delta) if n else math.inf for n in set(num_examples)}
    return tuple(found[n] for n in num_examples)
