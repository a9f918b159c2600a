"""A site that comes later makes itself a model of its own out of an offer, on its own machine."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fedmerge.data import Examples
from fedmerge.deploy.client import WAIT
from fedmerge.deploy.federation import terms_of
from fedmerge.deploy.messages import Score
from fedmerge.deploy.offer import Offer, read_offer
from fedmerge.deploy.private_state import site_held
from fedmerge.deploy.site import SiteConfig
from fedmerge.deploy.site_data import site_client
from fedmerge.deploy.site_model import FOLDER, ModelNote, client_of_note, write_model_folder
from fedmerge.deploy.site_use import SiteModel
from fedmerge.deploy.trees import form_of
from fedmerge.experiment.federation import channels_last, encoder_of, in_precision
from fedmerge.experiment.serving import frozen_draw
from fedmerge.experiment.store import versions
from fedmerge.onboarding import Onboarded, onboard_server


@dataclass(frozen=True)
class Joined:
    """What a newcomer has got.

    Attributes:
        folder: Of its model, which `fedmerge.deploy.site_use.read_site_model` reads.
        onboarded: How the model came about, and how good it is expected to be.
        test: Score on the site's own test examples, which nothing was chosen by.
    """

    folder: Path
    onboarded: Onboarded
    test: Score


def join(offer: Offer | Path | str, site: SiteConfig, *, way: str = "auto", seed: int = 0, model: Any = None) -> Joined:
    """Makes a newcomer's own model on its own machine, and writes it as the sites that take part have theirs.

    Its train examples are fitted on and its validation examples decide between the ways, if it has any; its test
    examples are scored once, at the end.

    Args:
        offer: Or its folder.
        site: The newcomer.
        way: One of `fedmerge.onboarding.WAYS`, or ``auto``.
        seed: Of folds and batches.
        model: As in `read_offer`.

    Raises:
        UsageError: if the folder is no offer or the way does not exist.
        DataError: naming what is wrong with the site's examples.
        FedmergeError: if the offer is damaged.
    """
    if not isinstance(offer, Offer):
        offer = read_offer(offer, model=model)
    terms, schema = offer.terms, offer.terms.schema
    own = site_client(site, schema, seed=terms.options.seed, encoder=encoder_of(offer.server.recipe))
    data = replace(schema.without_examples([site.name]), clients=(own,))
    client = channels_last(in_precision(data, terms.options.dtype)).clients[0]
    # whoever brings an output layer of its own has the classes of its train examples
    kept = torch.unique(client.train.targets).tolist() if offer.server.kept else range(schema.num_classes)
    held = _of_classes(client.validation, schema.class_names, tuple(schema.class_names[k] for k in kept))
    validation = held if len(held.targets) else None
    done = onboard_server(offer.server, client.train, validation=validation, way=way, seed=seed)
    names = done.server.record.class_names
    terms = replace(terms, model=offer.server.recipe or terms.model)
    if names != schema.class_names:
        terms = replace(terms, schema=replace(schema, class_names=names))
    note = ModelNote(
        site=site.name,
        run=offer.note.run,
        round=offer.note.round,
        terms=offer.note.terms if names == schema.class_names else terms.plain(),
        terms_sha256=terms_of(offer.note.terms).digest,
        class_names=names,
        inputs=schema.form.plain(),
        form=tuple(form_of(done.params)),
        num_train=client.num_train,
        num_validation=len(client.validation.targets),
        num_test=len(client.test.targets),
        data_sha256=data.sha256(),
        federation=offer.note.federation,
        way=done.way,
        frozen_draw=frozen_draw(done.server.module) or "",
        versions=versions(),
    )
    folder = site.folder / FOLDER
    made = client_of_note(note, terms, done.server.module, done.server.layout, done.params)
    unscored = SiteModel(folder, note, terms, made)
    note = replace(note, validation=_score(unscored, client.validation, schema.class_names))
    note = replace(note, test=_score(unscored, client.test, schema.class_names))
    made = client_of_note(note, terms, done.server.module, done.server.layout, done.params)
    with site_held(site.state_folder, WAIT):
        write_model_folder(folder, made, note, {"onboard.json": json.dumps(done.plain(), indent=1) + "\n"})
    return Joined(folder, done, note.test)


def _score(model: SiteModel, examples: Examples, names: tuple[str, ...]) -> Score:
    """On examples whose classes go by `names`; one of a class that the model does not know is never right."""
    own = _of_classes(examples, names, model.class_names)
    if not len(examples.targets):
        return Score()
    if not len(own.targets):
        return Score(0.0)
    found = model.score(own)
    if len(own.targets) == len(examples.targets):
        return Score(found.accuracy, found.loss)
    return Score(round(found.accuracy * found.num_rows) / len(examples.targets))


def _of_classes(examples: Examples, names: tuple[str, ...], own: tuple[str, ...]) -> Examples:
    """The examples, whose classes go by `names`, that are of classes `own`, by which they go then."""
    places = {name: k for k, name in enumerate(own)}
    targets = torch.tensor([places.get(name, -1) for name in names], dtype=torch.int64)[examples.targets]
    known = targets >= 0
    return (
        Examples(examples.inputs[known], targets[known])
        if not bool(known.all())
        else Examples(examples.inputs, targets)
    )
