"""The end of a deployed run: every site gets its own model."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial

from fedmerge.core.tensor_files import read_tensors
from fedmerge.deploy.deployment import Deployment, write_deployment
from fedmerge.deploy.messages import Letter, Order, answer_from
from fedmerge.deploy.office import bases
from fedmerge.deploy.outbox import Outbox, lettered
from fedmerge.deploy.plan import Plan
from fedmerge.deploy.post import Asking, Post, Taken
from fedmerge.deploy.trees import form_of
from fedmerge.experiment.checkpoint import restored
from fedmerge.experiment.record import RunRecord, read_run
from fedmerge.experiment.simulation import Progress

log = logging.getLogger(__name__)


def selected_of(plan: Plan) -> Progress:
    """The selected state of a finished run."""
    folder = plan.federation.run_folder
    return restored(plan.start, read_tensors(folder / "models.safetensors"), read_run(folder).selected().round)


def hand_over(plan: Plan, deployment: Deployment, post: Post, record: RunRecord, selected: Progress) -> None:
    """Gives every site its model of the selected round; those that are not there get it when the run is started again.

    Args:
        plan: Of the run.
        deployment: Who has a model already.
        post: To the sites.
        record: With all rounds.
        selected: The state at the selected round.
    """
    names, folder = plan.federation.names, plan.federation.run_folder
    living = plan.federation.living
    left = [i for i, name in enumerate(names) if name in living and name not in deployment.delivered]
    number = selected.round
    since = bases([line for line in record.rounds if line.round <= number], len(names))
    box, terms = Outbox(plan.setup, selected.state, range(len(names))), plan.federation.terms.plain()
    done = list(deployment.delivered)

    def letter(i: int, failures: int) -> Letter:
        tree, base = box.of(i), since[i]
        order = Order(
            "final",
            deployment.run,
            number,
            i,
            names[i],
            terms,
            base=base,
            keep=(base,),
            form=tuple(form_of(tree)),
            seconds=plan.federation.deploy.limit(failures),
        )
        return lettered(order, tree)

    def take(name: str, letter: Letter) -> Taken:
        answer = answer_from(letter.text)
        if (answer.site, answer.run) != (name, deployment.run):
            return Taken(False, f"it answered for {answer.site!r}")
        done.append(name)
        write_deployment(folder, replace(deployment, delivered=tuple(done)))
        return Taken(True)

    missing = post.ask(Asking("final", "models", {names[i]: partial(letter, i) for i in left}, take, 0))
    for name, why in sorted(missing.items()):
        log.warning("site %s has not got its model: %s; run the federation again to give it one", name, why)
    without = f"; without their models: {', '.join(sorted(missing))}" if missing else ""
    post.roll.board.close(f"finished{without}")
    log.info("finished: %d of %d sites have their models", len(done), len(living))
