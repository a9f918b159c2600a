"""What a site gets does not depend on how many messages fit into memory."""

from dataclasses import replace

import pytest
import torch
from small_deployment import HereLink, SlowClock, write_federation

from fedmerge.core.files import make_folder
from fedmerge.deploy.deployment import new_deployment
from fedmerge.deploy.office import open_office
from fedmerge.deploy.outbox import FEWEST, Outbox, Templates
from fedmerge.deploy.plan import plan_of
from fedmerge.deploy.post import Post
from fedmerge.deploy.roll import Roll
from fedmerge.deploy.rounds import next_round
from fedmerge.deploy.server import _doubt, _hello
from fedmerge.deploy.status import Board, Status


@pytest.mark.parametrize("sites", [5, 15, 16, 17, 33])
@pytest.mark.parametrize("method", [{"name": "fedmerge", "num_models": 3, "initial": "noise"}, {"name": "ifca"}])
def test_messages_are_the_same_in_blocks_of_any_size(tmp_path, sites, method):
    names = tuple(f"s{place:02d}" for place in range(sites))
    options = {"method": method, "model": {"name": "mlp", "hidden": [60]}}
    plan = plan_of(write_federation(tmp_path / "f", names=names, **options))
    clients = range(sites)
    whole = plan.setup.played.send(plan.start.state, torch.arange(sites))
    blocks = Outbox(plan.setup, plan.start.state, clients, most_bytes=1)
    for client in [*clients, 0, sites - 1, 1]:
        assert torch.equal(blocks.of(client), whole[client])


def test_a_block_is_never_a_few_rows(tmp_path):
    names = tuple(f"s{place:02d}" for place in range(FEWEST + 1))
    plan = plan_of(write_federation(tmp_path / "f", names=names))
    sent, played = [], plan.setup.played

    class Watched:
        cost = played.cost

        @staticmethod
        def send(state, clients):
            sent.append(len(clients))
            return played.send(state, clients)

    box = Outbox(replace(plan.setup, played=Watched), plan.start.state, range(FEWEST + 1), most_bytes=1)
    for client in range(FEWEST + 1):
        box.of(client)
    assert sent == [FEWEST, FEWEST]


def test_the_form_of_an_update_is_found_in_one_step(tmp_path):
    training = {"steps": 5000, "batch_size": 2, "lr": 0.1}
    plan = plan_of(write_federation(tmp_path / "f", training=training))
    steps = []

    class Watched:
        @staticmethod
        def map(function, jobs):
            steps.extend(len(job[2].sizes()) for job in jobs)
            return plan.setup.engine.map(function, jobs)

    received = Outbox(plan.setup, plan.start.state, [0]).of(0)
    template = Templates(replace(plan.setup, engine=Watched), plan.federation.terms.schema).answering(received)
    assert steps == [1]
    assert list(template.forms) == ["delta"]
    assert template.forms["delta"].shape == received.shape


def test_the_scoring_round_makes_up_no_update(tmp_path):
    asked = []

    class Watched(Templates):
        def answering(self, received):
            asked.append(received)
            return super().answering(received)

    federation = write_federation(tmp_path / "f", rounds=2)
    plan = plan_of(federation)
    plan = replace(plan, templates=Watched(plan.setup, federation.terms.schema))
    deployment = new_deployment(federation.terms.digest)
    folder = federation.run_folder
    make_folder(folder)
    board = Board(folder, Status(run=deployment.run, rounds=2))
    link = HereLink(federation)
    hello, doubt = _hello(federation, deployment), _doubt(federation)
    post = Post(Roll(link, federation.names, federation.deploy, hello, doubt, board, SlowClock().clock()))
    with open_office(plan, deployment, None, post) as office:
        post.wait_for_reports(3)
        while office.open is not None:
            next_round(office)
    assert len(asked) == 2, "one for each round, none for the scores of the last"
