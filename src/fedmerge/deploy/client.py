"""What a site does when the server asks: pure work on its own examples and its own state. Knows no network."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from fedmerge.core.ensemble import Personal
from fedmerge.core.errors import FedmergeError, UsageError
from fedmerge.core.randomness import fresh_module_randomness
from fedmerge.core.replies import named_tensors
from fedmerge.data import ClientData
from fedmerge.deploy.federation import FILE, Terms, agreed_on, in_client_order, terms_of
from fedmerge.deploy.messages import Answer, Letter, Order, Score, order_from, text_of
from fedmerge.deploy.moments import moments
from fedmerge.deploy.private_state import PrivateState, site_held
from fedmerge.deploy.protection import seed_of_release
from fedmerge.deploy.ready import Site, ready_site
from fedmerge.deploy.site import SiteConfig
from fedmerge.deploy.site_data import raw_client
from fedmerge.deploy.site_model import write_site_model
from fedmerge.deploy.telling import tellable, told_versions
from fedmerge.deploy.time_limit import time_limit
from fedmerge.deploy.trees import tree_from
from fedmerge.experiment.config import read_toml
from fedmerge.experiment.federation import encoder_of
from fedmerge.experiment.simulation import one_thread
from fedmerge.runtime import Fleet
from fedmerge.runtime.rounds import ClientRound, models_received
from fedmerge.training import Planned, one_pass, rate_of_round
from fedmerge.training.scores import tally

log = logging.getLogger(__name__)

WAIT = 120.0
"""Seconds that a site waits for an earlier process of its own to end."""


def answer_to(letter: Letter, config: SiteConfig, *, alone: bool = False) -> Letter:
    """The site's answer to a message.

    Args:
        letter: As it came.
        config: The site's own.
        alone: Whether this process does nothing else, so that it may end itself if it hangs.

    Raises:
        FedmergeError: if the message is damaged, is meant for another site, asks for other terms than those agreed on,
            or the site's data or state do not allow an answer.
    """
    began = time.perf_counter()
    with tellable(config.folder):
        order = order_from(letter.text)
        terms = accepted(order, config)
    tensors: Mapping[str, Tensor] = {}
    with time_limit(order.seconds if alone else 0.0), one_thread():
        if order.kind == "hello":
            answer = _introduction(order, config, terms)
        else:
            with site_held(config.state_folder, WAIT):
                answer, tensors = _work(order, ready_site(config, terms), letter.tensors)
    answer = replace(answer, seconds=time.perf_counter() - began, versions=told_versions())
    log.info("%s", _news(order, answer))
    return Letter(text_of(answer), tensors)


def _news(order: Order, answer: Answer) -> str:
    """What people at the site may want to know of an answer."""
    if order.kind == "hello":
        counts = f"{answer.num_train:,} train, {answer.num_validation:,} validation, {answer.num_test:,} test examples"
        return f"the server knows this site, which has {counts}"
    splits = (("validation", answer.validation.accuracy), ("test", answer.test.accuracy))
    scores = " and ".join(f"{accuracy:.4f} on {split}" for split, accuracy in splits if accuracy is not None)
    if order.kind == "final":
        return f"this site's own model, of round {order.round}, is here; its accuracy: {scores or 'not known'}"
    scored = f"; the model that came has accuracy {scores}" if scores else ""
    return f"round {order.round}: {'trained' if order.train else 'scored without training'}{scored}"


def accepted(order: Order, config: SiteConfig) -> Terms:
    """The terms of an order, if the site may do what it asks for.

    Raises:
        FedmergeError: if it is for another site, or asks for what was not agreed on.
    """
    if order.kind != "hello" and order.site != config.name:
        raise FedmergeError(f"the server's message is for site {order.site!r}; this is {config.name!r}")
    own = read_toml(config.folder / FILE) if (config.folder / FILE).is_file() else None
    terms = _agreed_terms(order.terms, own)
    if order.kind != "hello":
        _refuse_odd(order, terms, config.name, own)
    return terms


def _agreed_terms(plain: Mapping[str, Any], own: Mapping[str, Any] | None) -> Terms:
    """The terms that a server asks for, if the site may work under them.

    Args:
        plain: As they came.
        own: The ``federation.toml`` in the site's folder: no other terms than its own are accepted. None without one.

    Raises:
        UsageError: if they are damaged, name a network of the server's own, or are not those agreed on.
    """
    terms = terms_of(plain)
    if own is None:
        if plain.get("model", {}).get("name") == "import":
            raise UsageError(
                "the server asks for a network from a file of its user's own (model 'import'), which a site loads only "
                f"if its own {FILE} names it; put the agreed file there"
            )
        return terms
    agreed = terms_of(agreed_on(own))
    if agreed.schema.needs_moments and terms.schema.mean and terms.schema.std:
        agreed = replace(agreed, schema=agreed.schema.with_scale(terms.schema.mean, terms.schema.std))
    if agreed.digest != terms.digest:
        difference = _first_difference(agreed.plain(), terms.plain())
        raise UsageError(
            f"the server asks for other terms than {FILE} holds ({difference}); agree with whoever runs the server "
            "and replace the file, or remove it to accept any terms"
        )
    return terms


def _refuse_odd(order: Order, terms: Terms, name: str, own: Mapping[str, Any] | None) -> None:
    """Refuses what the terms do not have room for: further rounds, another rate, another site's place.

    Raises:
        UsageError: naming it.
    """
    rounds, training = terms.options.rounds, terms.training
    if not 0 <= order.round <= rounds + (order.kind == "round") or (order.train and order.round > rounds):
        raise UsageError(f"the server asks for round {order.round}; the terms have {rounds}")
    if order.train and order.rate != rate_of_round(training, order.round, rounds):
        raise UsageError(f"the server asks for rate {order.rate} in round {order.round}, which the terms do not have")
    names = [] if own is None else in_client_order(own.get("sites", {}))
    if name in names and names.index(name) != order.client:
        raise UsageError(
            f"the server calls this site client {order.client}; in {FILE} it is {names.index(name)}: bring the "
            "server's federation.toml, whose sites are others now"
        )


def _first_difference(own: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    key = next(key for key in sorted({*own, *asked}) if own.get(key) != asked.get(key))
    if isinstance(own.get(key), dict) and isinstance(asked.get(key), dict):
        return f"{key}.{_first_difference(own[key], asked[key])}"
    return f"{key}: agreed {own.get(key)!r}, asked {asked.get(key)!r}"


def _introduction(order: Order, config: SiteConfig, terms: Terms) -> Answer:
    """Who the site is and how many examples it has; their sums too, where the scale is still to be found."""
    encoder = encoder_of(terms.model)
    client = raw_client(config, terms.schema, seed=terms.options.seed, encoder=encoder)
    sums = moments(client).plain() if terms.schema.needs_moments else {}
    return replace(_counts(order, client, config), moments=sums)


def _counts(order: Order, client: ClientData, config: SiteConfig) -> Answer:
    return Answer(
        run=order.run,
        round=order.round,
        client=order.client,
        site=config.name,
        num_train=client.num_train,
        num_validation=len(client.validation.targets),
        num_test=len(client.test.targets),
    )


def _work(order: Order, site: Site, tensors: Mapping[str, Tensor]) -> tuple[Answer, Mapping[str, Tensor]]:
    """A round's or the last message's work."""
    state = PrivateState(site.config.state_folder, order.run, site.fresh())
    fleet, note = state.at(order.base, anew=site.config.anew)
    state.forget_before(order.round, {order.base, *order.keep})
    method = type(site.terms.method).__module__
    received = tree_from(list(order.form), [tensors[str(k)] for k in range(len(tensors))], modules=(method,))
    answer = replace(_counts(order, site.client, site.config), note=note)
    if order.evaluate or order.kind == "final":
        model = _model(site, received, fleet)
        validation, test = (_score(site, model, split) for split in ("validation", "test"))
        answer = replace(answer, validation=validation, test=test)
        if order.kind == "final":
            write_site_model(site, model, order, answer)
            state.forget_other_runs()
    if not order.train:
        return answer, {}
    update, fleet, passed = _trained(site, order, received, fleet)
    state.save(order.round, fleet)
    return replace(answer, passed=passed), named_tensors(update)


def _model(site: Site, received: Any, fleet: Fleet) -> Personal:
    """The model that the site would use now."""
    training = site.training
    passes = [one_pass(site.client.train, training.batch_size, training.lr)]
    return models_received(site.played, [received], fleet, passes, site.engine)[0]


def _score(site: Site, model: Personal, split: str) -> Score:
    batches = one_pass(getattr(site.client, split))
    if not batches:
        return Score()
    found = site.engine.map(tally, [(model, batches)])[0]
    if not found.loss.isfinite():
        return Score()
    return Score(float(found.right / found.count), float(found.loss / found.count))


def _trained(site: Site, order: Order, received: Any, fleet: Fleet) -> tuple[Any, Fleet, int]:
    """The update, what the site keeps from now on if it is admitted, and the number of examples passed."""
    seed, training = site.terms.options.seed, site.training
    drawn_from = seed if training.dp_clip is None else _secret_seed(site, order, received, fleet)
    plan = Planned(site.client.train, training, order.rate, drawn_from, order.round, order.client)
    with fresh_module_randomness(seed, "dropout at a site", order.round, order.client):
        update, private, buffers = site.engine.map(
            ClientRound(site.played, fleet.rules), [(received, fleet.private[0], plan, fleet.buffers[0])]
        )[0]
    passed = sum(plan.sizes()) if training.dp_clip is None else training.passes(site.client.num_train)
    return update, replace(fleet, private=(private,), buffers=(buffers,)), passed


def _secret_seed(site: Site, order: Order, received: Any, fleet: Fleet) -> int:
    """Of a protected update: nobody else can tell its batches and its noise, and no other update has them."""
    return seed_of_release(
        site.config.state_folder,
        run=order.run,
        rounds=site.terms.options.rounds,
        facts=(order.round, order.client, order.rate, site.terms.digest),
        tree=(received, fleet.private, fleet.buffers, tuple(site.client.train)),
    )
