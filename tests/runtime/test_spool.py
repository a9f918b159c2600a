"""Replies on the disk give the bits of replies in memory."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fedmerge.algorithms.fedmerge import FedMerge
from fedmerge.core.protocol import Federation, Update, deliver, state_tensors
from fedmerge.core.replies import Reply, named_tensors, stacked_updates, template_of
from fedmerge.core.sums import ROWS, inner_products, squared_norms, weighted_sum
from fedmerge.runtime.spool import Cohort, Spool

COHORT = (1, 4, 5, 8, 9)


def replies(clients: tuple[int, ...]) -> list[Reply]:
    generator = torch.Generator().manual_seed(3)
    vectors = {i: torch.randn(7, generator=generator) for i in COHORT}
    return [Reply("r", 1, i, 10 + i, {"delta": vectors[i], "which": torch.tensor(i)}) for i in clients]


TEMPLATE = template_of({"delta": torch.zeros(7), "which": torch.tensor(0)})


@pytest.mark.parametrize("clients", [COHORT, (9, 1, 5), (8,), (4, 5, 8, 9, 1)])
def test_what_was_taken_in_comes_out_in_client_order(tmp_path: Path, clients: tuple[int, ...]) -> None:
    spool, came = Spool(tmp_path, TEMPLATE, COHORT), replies(clients)
    for reply in came:
        spool.take(reply)
    found, update, counts = spool.gathered()
    ordered = sorted(came, key=lambda reply: reply.client)
    assert found.tolist() == sorted(clients)
    assert counts.tolist() == [10 + i for i in sorted(clients)]
    wanted = named_tensors(stacked_updates(ordered, TEMPLATE))
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in named_tensors(update).items())


@pytest.mark.parametrize("given", [COHORT, COHORT[::-1], torch.tensor(COHORT[::-1])])
def test_a_cohort_is_the_set_of_its_clients(given: Any) -> None:
    cohort = Cohort(given)
    assert list(cohort) == sorted(COHORT)
    assert len(cohort) == len(COHORT)
    assert [client in cohort for client in range(11)] == [client in COHORT for client in range(11)]
    assert not any(other in cohort for other in (-1, 10**30, 4.0, "4", None))
    assert [cohort.place(client) for client in sorted(COHORT)] == list(range(len(COHORT)))


def test_a_cohort_may_be_empty() -> None:
    assert list(Cohort([])) == []
    assert 0 not in Cohort([])


def test_files_are_their_owners_and_begin_anew(tmp_path: Path) -> None:
    for _ in range(2):
        spool = Spool(tmp_path, TEMPLATE, COHORT)
        spool.take(replies((4,))[0])
        assert spool.gathered()[0].tolist() == [4]
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}


def test_a_method_takes_replies_from_the_disk_as_from_memory(tmp_path: Path) -> None:
    method: Any = FedMerge(num_models=2, initial="noise")
    facts = Federation(10, 7, (4, 7), ((0, 7),))
    state = method.init(lambda j: torch.arange(7.0) * (j + 1), facts, 0)
    came = [Reply("r", 1, r.client, r.num_examples, {"delta": r.tensors["delta"]}) for r in replies(COHORT)]
    template = template_of(Update(torch.zeros(7)))
    spool = Spool(tmp_path, template, COHORT)
    for reply in reversed(came):
        spool.take(reply)
    counts = torch.tensor([reply.num_examples for reply in came])
    from_disk = state_tensors(deliver(method, state, *spool.gathered()))
    in_memory = state_tensors(deliver(method, state, torch.tensor(COHORT), stacked_updates(came, template), counts))
    assert all(torch.equal(from_disk[name].nan_to_num(7), tensor.nan_to_num(7)) for name, tensor in in_memory.items())


def test_sums_over_many_clients_are_those_over_all_at_once() -> None:
    generator = torch.Generator().manual_seed(5)
    many = torch.randn(2 * ROWS + 3, 5, generator=generator)
    weights = torch.rand(len(many), 2, generator=generator)
    torch.testing.assert_close(weighted_sum(weights, many), weights.double().T @ many.double(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        inner_products(many, many[:3]), many.double() @ many[:3].double().T, rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(squared_norms(many), many.double().square().sum(dim=1), rtol=1e-12, atol=1e-12)
