"""The search for structure: when it decides, what it decides, and the split, with numbers one can follow."""

import logging
import math

import pytest
import torch

from fedmerge.algorithms.fedmerge import FedMerge
from fedmerge.core.protocol import Federation, Update, deliver

FACTS = {"num_trainable": 2, "head": (0, 2), "layers": ((0, 2),)}


def begin(algorithm, num_clients, P=2):
    return algorithm.init(
        lambda j: torch.full((P,), 10.0 + j, dtype=torch.float64), Federation(num_clients, **FACTS), 0
    )


def reply(algorithm, state, updates, clients=None):
    clients = torch.arange(len(updates)) if clients is None else torch.tensor(clients)
    updates = torch.tensor(updates, dtype=torch.float64)
    return deliver(algorithm, state, clients, Update(updates), torch.ones(len(updates), dtype=torch.int64))


TWO_WAYS = [[2.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [-2.0, 0.0]]
ONE_WAY = [[1.0, 1.0], [2.0, 2.0], [0.5, 0.5], [1.0, 1.0]]


def test_the_split_by_hand():
    """Mean of h is (0, 1), so Θ = (10, 9) first; group means (±1.5, 1) less that give 10 ∓ 1.5; W is 1 for the own."""
    algorithm = FedMerge(num_models=2, search_rounds=1, momentum=0.0)
    state = reply(algorithm, begin(algorithm, 4), [[2.0, 1.0], [1.0, 1.0], [-1.0, 1.0], [-2.0, 1.0]])
    assert state.soup.models.tolist() == [[8.5, 9.0], [11.5, 9.0]]
    assert state.soup.logits.tolist() == [[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]]
    assert not bool(state.searching)
    assert state.progress.shape == (0, 2)


def test_the_gate_by_hand():
    """Six pairs in two directions: cosines 1, −1, −1, −1, −1, 1; mean −1/3, sd sqrt(1 − 1/9)."""
    algorithm = FedMerge(num_models=2, search_rounds=1)
    state = reply(algorithm, begin(algorithm, 4), TWO_WAYS)
    assert float(state.gate) == pytest.approx(math.sqrt(8 / 9))


def test_updates_add_up_over_the_rounds_of_the_search():
    """Client 0 turns from (2, 0) to (−2, 0) in total (−1, 0): it belongs to the last two."""
    algorithm = FedMerge(num_models=2, search_rounds=2, momentum=0.0)
    first = reply(algorithm, begin(algorithm, 4), TWO_WAYS)
    assert bool(first.searching)
    assert first.progress.tolist() == TWO_WAYS
    second = reply(algorithm, first, [[-3.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [-2.0, 0.0]])
    assert second.soup.logits[0].argmax(dim=1).tolist() == [0, 1, 0, 0]


def test_the_search_itself_is_fedavg_with_momentum():
    """ONE_WAY has mean 1.125: v = 1.125, then 0.5 · 1.125 + 1.125."""
    algorithm = FedMerge()
    state = reply(algorithm, reply(algorithm, begin(algorithm, 4), ONE_WAY), ONE_WAY)
    assert state.soup.models.tolist() == [[10 - 1.125 - (0.5 * 1.125 + 1.125)] * 2]
    assert bool(state.searching)


def test_without_structure_one_model_is_kept():
    algorithm = FedMerge(search_rounds=1)
    state = reply(algorithm, begin(algorithm, 4), ONE_WAY)
    assert len(state.soup.models) == 1
    assert algorithm.describe(state) == {"num_models": 1, "searching": False, "gate": pytest.approx(0.0, abs=1e-7)}


def test_a_number_that_is_asked_for_overrules_the_gate():
    replies = [[1.0, 0.01 * i * i] for i in range(6)]
    algorithm = FedMerge(num_models=2, search_rounds=1)
    state = reply(algorithm, begin(algorithm, 6), replies)
    assert float(state.gate) < 0.12
    assert len(state.soup.models) == 2


def test_fewer_groups_than_asked_for_are_told_to_the_user(caplog):
    """Replies that all point one way cannot be told apart; the method stays with one model and says so."""
    algorithm = FedMerge(num_models=3, search_rounds=1)
    with caplog.at_level(logging.WARNING, logger="fedmerge"):
        state = reply(algorithm, begin(algorithm, 4), ONE_WAY)
    assert len(state.soup.models) == 1
    assert "asked for 3 models, but the clients' updates fall into 1 group(s)" in caplog.text


def test_the_search_waits_for_half_of_the_clients():
    algorithm = FedMerge(num_models=2, search_rounds=1)
    state = begin(algorithm, 10)
    state = reply(algorithm, state, TWO_WAYS, clients=[0, 1, 2, 3])
    assert bool(state.searching)
    state = reply(algorithm, state, [[-2.0, 0.1]], clients=[9])
    assert not bool(state.searching)


def test_a_client_that_was_not_seen_starts_with_a_uniform_row():
    algorithm = FedMerge(num_models=2, search_rounds=1)
    state = reply(algorithm, begin(algorithm, 6), TWO_WAYS, clients=[0, 2, 3, 5])
    assert state.soup.logits[0].tolist() == [[1, 0], [0, 0], [1, 0], [0, 1], [0, 0], [0, 1]]
    assert algorithm.mixing(state)[1].tolist() == [0.5, 0.5]


def test_buffers_are_the_same_in_all_models_after_the_split():
    algorithm = FedMerge(num_models=2, search_rounds=1, momentum=0.0)
    state = reply(algorithm, begin(algorithm, 4, P=3), [[*u, 1.0] for u in TWO_WAYS])
    assert state.soup.models[:, 2].tolist() == [9.0, 9.0]


def test_models_in_use_counts_the_favourites():
    algorithm = FedMerge(num_models=2, search_rounds=1)
    state = reply(algorithm, begin(algorithm, 4), TWO_WAYS)
    assert algorithm.describe(state)["models_in_use"] == 2


def test_adam_starts_afresh_after_the_split():
    """Its first step on rows that have just been made is the whole learning rate in every coordinate."""
    algorithm = FedMerge(rule="adam", initial="split", num_models=2, search_rounds=1, mixing_lr=0.1, decay=0.0)
    state = reply(algorithm, begin(algorithm, 4), TWO_WAYS)
    moved = reply(algorithm, state, TWO_WAYS)
    torch.testing.assert_close((moved.soup.logits - state.soup.logits).abs(), torch.full((1, 4, 2), 0.1).double())
