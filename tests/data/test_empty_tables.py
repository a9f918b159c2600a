"""Tables without rows, whose labels are of whatever kind numpy or a file calls nothing."""

import numpy as np
import pytest

from fedmerge.core.errors import DataError
from fedmerge.data.byo import from_arrays

ROWS = ([[1.0], [2.0]] * 5, [0, 1] * 5)


@pytest.mark.parametrize("labels", [[], np.zeros(0, dtype=np.int64), np.array([], dtype=np.str_)])
def test_no_rows_at_all_is_one_message(labels):
    with pytest.raises(DataError, match="client 'a', train has no rows; expected one at least"):
        from_arrays({"a": (np.zeros((0, 2)), labels)})


@pytest.mark.parametrize("labels", [[], np.array([], dtype=np.str_)])
def test_a_split_without_rows_has_no_say_in_what_labels_are(labels):
    (client,) = from_arrays({"a": {"train": ROWS, "test": (np.zeros((0, 1)), labels)}}).clients
    assert len(client.test.targets) == 0
    assert len(client.train.targets) + len(client.validation.targets) == 10
