"""The model of its own that a site has after training: a folder that is there whole, for the site's own eyes.

``model/`` in the site's folder holds::

    model.safetensors   the network's tensors by name; of several networks below ``networks.<k>.``, see the card
    model.json          what later use needs, see `ModelNote`
    README.md           the card: scores, classes, scaling, how to load it in plain torch
    inputs.json         shape and scaling of raw inputs, where they are numbers
    adapter_*           PEFT's files, of an adapted pretrained network
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from fedmerge._version import __version__
from fedmerge.algorithms import ALGORITHMS
from fedmerge.core.ensemble import Personal
from fedmerge.core.errors import FedmergeError, UsageError, together
from fedmerge.core.files import write_atomically
from fedmerge.core.options import build_options
from fedmerge.core.strict_json import parse_json_table, read_bounded
from fedmerge.deploy.federation import FILE as FEDERATION
from fedmerge.deploy.federation import Terms
from fedmerge.deploy.messages import Answer, Order, Score
from fedmerge.deploy.replacing import replacing
from fedmerge.deploy.trees import form_of
from fedmerge.experiment.config import plain_options, read_toml
from fedmerge.experiment.elsewhere import fleet_elsewhere, setup_on
from fedmerge.experiment.record import RoundRecord, RunRecord, Scores, to_plain
from fedmerge.experiment.serving import Serving, frozen_draw, recipe_table
from fedmerge.experiment.simulation import Progress

if TYPE_CHECKING:
    from fedmerge.core.vector import Layout
    from fedmerge.deploy.ready import Site
    from fedmerge.exporting import Client

FOLDER = "model"
NOTE = "model.json"
FORMAT = "fedmerge site model 1"


@dataclass(frozen=True)
class ModelNote:
    """What is known of a site's model beside its tensors.

    Attributes:
        site: Whose it is.
        run: Identity of the run.
        round: That the model is of.
        terms: What was agreed on, from `Terms.plain`; its class names are those of the model.
        terms_sha256: Digest of what server and sites agreed on.
        class_names: Of the outputs, in order.
        inputs: Shape and scaling of raw inputs, from `InputForm.plain`.
        form: Of the model as a tree, see `trees.form_of`: one vector, or several and what combines them.
        num_train: The site's examples; `num_validation` and `num_test` alike.
        validation: Score on the site's own validation examples; `test` alike.
        data_sha256: Of the site's examples and their splits.
        federation: What it is called; empty where the site does not know.
        num_sites: That may take part; 0 where the site does not know.
        way: How a site that joined later came to its model; empty for one that took part.
        frozen_draw: Hash of what the network drew and never trains; empty for nothing.
        versions: Of fedmerge, python, torch and machine.
        format: Of this file.
    """

    site: str
    run: str
    round: int
    terms: Mapping[str, Any]
    terms_sha256: str
    class_names: tuple[str, ...]
    inputs: Mapping[str, Any]
    form: tuple[Any, ...]
    num_train: int
    num_validation: int
    num_test: int
    validation: Score = field(default_factory=Score)
    test: Score = field(default_factory=Score)
    data_sha256: str = ""
    federation: str = ""
    num_sites: int = 0
    way: str = ""
    frozen_draw: str = ""
    versions: Mapping[str, Any] = field(default_factory=dict)
    format: str = FORMAT


def write_site_model(site: Site, model: Personal, order: Order, answer: Answer) -> None:
    """Writes the model that a site is left with into ``model/`` of its folder, in the place of an earlier one.

    Args:
        site: Whose.
        model: As one vector or several.
        order: The server's last message.
        answer: What the site tells of it.

    Raises:
        OSError: if it cannot be written; the earlier model stays then.
    """
    name, count = federation_of(site.config.folder)
    terms = site.terms
    note = ModelNote(
        site=site.config.name,
        run=order.run,
        round=order.round,
        terms=terms.plain(),
        terms_sha256=terms.digest,
        class_names=terms.schema.class_names,
        inputs=terms.schema.form.plain(),
        form=tuple(form_of(model)),
        num_train=answer.num_train,
        num_validation=answer.num_validation,
        num_test=answer.num_test,
        validation=answer.validation,
        test=answer.test,
        data_sha256=site.data.sha256(),
        federation=name,
        num_sites=count,
        frozen_draw=frozen_draw(site.module) or "",
        versions=answer.versions or {"fedmerge": __version__},
    )
    write_model_folder(site.config.folder / FOLDER, client_of_note(note, terms, site.module, site.layout, model), note)


def federation_of(folder: Path) -> tuple[str, int]:
    """Name of a site's federation and number of its sites, as far as the site's own copy of its file says."""
    path = folder / FEDERATION
    try:
        table = read_toml(path) if path.is_file() else {}
    except UsageError:  # damaged: nothing that a model's card needs
        return "", 0
    deploy, sites = table.get("deploy", {}), table.get("sites", {})
    name = deploy.get("name", "") if isinstance(deploy, Mapping) else ""
    return str(name), len(sites) if isinstance(sites, Mapping) else 0


def client_of_note(note: ModelNote, terms: Terms, module: nn.Module, layout: Layout, model: Personal) -> Client:
    """The site's model as `fedmerge.exporting` knows the models of a run's clients.

    Args:
        note: What is known of it.
        terms: Of the note.
        module: The network.
        layout: Of the module.
        model: One vector or several.
    """
    # only the last message needs what writes models for others
    from fedmerge.exporting import Client, Trained  # noqa: PLC0415

    data = terms.schema.without_examples([note.site])
    setup = setup_on(module, layout, terms.method, terms.training, terms.options, data)
    serving = Serving(recipe_table(terms.model), terms.training, terms.options, terms.schema.form)
    record = _record(note, terms, layout.num_params)
    trained = Trained(record, serving, terms.model, setup, Progress(None, fleet_elsewhere(setup), note.round))
    return Client(trained, 0, model, _why(note), _facts(note))


def _record(note: ModelNote, terms: Terms, num_params: int) -> RunRecord:
    """What a run of this site alone would have written down."""
    validation, test = (Scores((score.accuracy,), (score.loss,)) for score in (note.validation, note.test))
    line = RoundRecord(note.round, (0,), 0.0, 0, 0, 0, 0, {}, validation=validation, test=test)
    return RunRecord(
        label=note.federation or "federation",
        method=ALGORITHMS.name_of(terms.method),
        options=plain_options(terms.method),
        seed=terms.options.seed,
        status="finished",
        client_names=(note.site,),
        groups=None,
        num_train=(note.num_train,),
        num_validation=(note.num_validation,),
        num_test=(note.num_test,),
        class_names=note.class_names,
        num_params=num_params,
        setting="",
        data_sha256=note.data_sha256,
        versions=note.versions,
        rounds=(line,),
        select="last",
    )


def _why(note: ModelNote) -> str:
    if note.way:
        return f"whose models on the server became this one by {note.way}, without taking part"
    return "which the server selected"


def _facts(note: ModelNote) -> tuple[tuple[str, str], ...]:
    sites = f", {note.num_sites} sites" if note.num_sites else ""
    return (
        ("federation", f"{note.federation or 'not known by name'}{sites}"),
        ("run", f"`{note.run}`"),
        ("terms sha256", f"`{note.terms_sha256}`"),
    )


# ---------------------------------------------------------------- files


def write_model_folder(place: Path, client: Client, note: ModelNote, further: Mapping[str, str] | None = None) -> None:
    """Writes a model's whole folder in the place of an earlier one; only its owner may read it.

    Args:
        place: The folder.
        client: Whose model it is.
        note: What is known of it.
        further: Texts of further files, by name.

    Raises:
        OSError: if it cannot be written; the earlier one stays then.
    """
    from fedmerge.exporting.card import card_text  # noqa: PLC0415 - as in `client_of_note`
    from fedmerge.exporting.ensembles import write_personal  # noqa: PLC0415

    with replacing(place) as new:
        card = write_personal(client, new)
        private = (
            "A site's own model tells of the site's examples: its files are for their owner alone.",
            f"`{NOTE}` holds what was agreed on in the federation; `fedmerge` reads model and note together.",
        )
        card = replace(card, limits=(*card.limits, *private))
        write_atomically(new / "README.md", card_text(client, card, row=False))
        write_atomically(new / NOTE, json.dumps(to_plain(note), indent=1) + "\n")
        for name, text in (further or {}).items():
            write_atomically(new / name, text)


def read_note(folder: Path) -> ModelNote:
    """What ``model.json`` says.

    Raises:
        UsageError: if the folder is no site's model.
        FedmergeError: if the file is damaged.
    """
    path = folder / NOTE
    if not path.is_file():
        raise UsageError(f"{folder} is no site's model: it has no {NOTE}; a site gets one when its federation is done")
    faults: list[str] = []
    try:
        plain = parse_json_table(read_bounded(path))
    except ValueError as error:
        raise FedmergeError(f"{path} is damaged: {error}; get the model again") from error
    if plain.get("format") != FORMAT:
        faults.append(f"format: got {plain.get('format')!r}; expected {FORMAT!r}")
    note = None if faults else build_options(ModelNote, plain, NOTE, faults)
    if note is None:
        raise FedmergeError(f"{path} is damaged: {together(faults)}; get the model again")
    return note
