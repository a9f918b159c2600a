"""The sums that a site tells of are those of this federation's features and of its own rows, or the site is named."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_deployment import HereLink, SlowClock, write_federation

from fedmerge.core.errors import DataError, FedmergeError
from fedmerge.data.federated import ClientData, Examples
from fedmerge.deploy.messages import Answer
from fedmerge.deploy.moments import fault_of_moments, moments, moments_of_answer
from fedmerge.deploy.schema import DataSchema
from fedmerge.deploy.server import serve

NUMBERS = DataSchema(class_names=("a", "b"), shape=(3,), scale="pooled")
GRIDS = DataSchema(class_names=("a", "b"), shape=(2, 5), scale="pooled")
IMAGES = DataSchema(class_names=("a", "b"), shape=(3, 4, 5), dtype="uint8", scale="pooled")


def told(schema, n=6):
    rng = np.random.default_rng(1)
    values = rng.integers(0, 255, (n, *schema.shape)).astype(schema.dtype)
    examples = Examples(torch.from_numpy(values), torch.zeros(n, dtype=torch.int64))
    own = moments(ClientData("north", examples, examples, examples))
    return own, Answer("r", 0, 0, "north", n, 0, 0, moments=own.plain())


@pytest.mark.parametrize("schema", [NUMBERS, GRIDS, IMAGES], ids=["numbers", "grids", "images"])
def test_a_site_s_own_sums_are_believed(schema):
    own, answer = told(schema)
    found = moments_of_answer(answer, schema)
    assert fault_of_moments(answer, schema) == ""
    assert (found.count, found.total.tolist(), found.squares.tolist()) == (
        own.count,
        own.total.tolist(),
        own.squares.tolist(),
    )


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"moments": {}}, r"site 'north': a site's moments are damaged; expected count, total and squares"),
        ({"total": [1.0] * 4, "squares": [1.0] * 4}, r"site 'north': got sums of 4 features; the federation has 3"),
        ({"count": 7}, r"site 'north': got sums over 7 numbers each; its 6 rows have 6"),
        ({"count": 2**52}, r"site 'north': got sums over 4503599627370496 numbers each; its 6 rows have 6"),
        ({"squares": [1.0, -1.0, 1.0]}, r"site 'north': .*feature 1 are no sums of numbers"),
        ({"total": [1.0, 1.0, float("nan")]}, r"site 'north': .*feature 2 are no sums of numbers"),
    ],
)
def test_sums_of_something_else_name_the_site(changes, fault):
    _, answer = told(NUMBERS)
    sums = changes.pop("moments", {**answer.moments, **changes})
    spoilt = replace(answer, moments=sums)
    with pytest.raises(DataError, match=fault) as caught:
        moments_of_answer(spoilt, NUMBERS)
    assert f"site 'north': {fault_of_moments(spoilt, NUMBERS)}" == str(caught.value)


def test_where_the_scale_is_known_no_sums_are_missed():
    _, answer = told(NUMBERS)
    assert fault_of_moments(replace(answer, moments={}), NUMBERS.with_scale([0.0], [1.0])) == ""


def test_the_numbers_of_an_image_are_its_pixels():
    _, answer = told(IMAGES)
    assert answer.moments["count"] == 6 * 4 * 5
    with pytest.raises(DataError, match=r"site 'north': got sums over 120 numbers each; its 5 rows have 100"):
        moments_of_answer(replace(answer, num_train=5), IMAGES)
    with pytest.raises(DataError, match=r"site 'north': got sums of 3 channels; the federation has 1"):
        moments_of_answer(answer, replace(IMAGES, shape=(1, 4, 5)))


def test_a_site_whose_sums_cannot_be_is_refused_by_name(tmp_path):
    options = {"class_names": ["0", "1", "2"], "shape": [6], "scale": "pooled"}
    federation = write_federation(tmp_path / "f", data=options)

    def tamper(name, kind, letter):
        plain = json.loads(letter.text)
        if (name, kind) == ("clinic-b", "hello"):
            plain["moments"]["count"] = 2**52
        return letter._replace(text=json.dumps(plain))

    with pytest.raises(FedmergeError, match="2 of 3 sites have reported"):
        serve(federation, HereLink(federation, tamper), clock=SlowClock().clock())
    told = (federation.run_folder / "status.json").read_text()
    assert "site 'clinic-b': got sums over 4503599627370496 numbers each" in told
