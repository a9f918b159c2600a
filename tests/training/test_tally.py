"""Right answers and losses by hand."""

import math

import torch

from fedmerge.core.protocol import Batch
from fedmerge.training import tally
from fedmerge.training.objective import cross_entropy, is_best


class Copying:
    """Predicts its own inputs as logits."""

    def predict(self, params, inputs):
        return inputs

    def losses(self, outputs, targets):
        return cross_entropy(outputs, targets)

    def right(self, outputs, targets):
        return is_best(outputs, targets)


def batch(inputs, targets, weight):
    return Batch(torch.tensor(inputs), torch.tensor(targets), torch.tensor(weight), torch.tensor(0.0))


def test_a_tally_by_hand():
    """Logits (log 3, 0) give 3/4 and 1/4: losses log 4/3 (right) and log 4 (wrong)."""
    odds = [math.log(3.0), 0.0]
    found = tally(Copying(), torch.zeros(1), (batch([odds, odds], [0, 1], [0.5, 0.5]), batch([odds], [0], [1.0])))
    assert (float(found.right), float(found.count)) == (2.0, 3.0)
    torch.testing.assert_close(found.loss, torch.tensor(2 * math.log(4 / 3) + math.log(4)).double(), atol=1e-6, rtol=0)


def test_padding_does_not_count():
    odds = [math.log(3.0), 0.0]
    found = tally(Copying(), torch.zeros(1), (batch([odds, odds], [0, 0], [1.0, 0.0]),))
    assert (float(found.right), float(found.count)) == (1.0, 1.0)


def test_no_batches_count_nothing():
    assert [float(part) for part in tally(Copying(), torch.zeros(1), ())] == [0.0, 0.0, 0.0]
