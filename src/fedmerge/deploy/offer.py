"""A site that comes later: what the server may give it, and how it gets a model of its own without disturbing anybody.

An offer is a folder that may leave the server. It holds the server's models of the selected round, what the network and
its inputs are, and of the known sites nothing but the mean of their merging weights, where there are three at least. It
holds no site's name, key, merging weights, numbers of examples or scores. The models themselves were trained on the
sites' examples and may tell of them together, as they do to every site that takes part.

What is left out has a price: a newcomer cannot begin at the merging weights of known sites that are like it (ways
``nearest`` and ``shrunk-weights`` of `fedmerge onboard`, and the fine-tuning that starts from the latter), and is not
told how it compares with others. All other ways give the same bits as `fedmerge onboard` on the whole run folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from fedmerge._version import __version__
from fedmerge.algorithms.dp_fedmerge import DpFedMerge
from fedmerge.core.errors import FedmergeError, UsageError, together
from fedmerge.core.files import write_atomically
from fedmerge.core.options import build_options
from fedmerge.core.strict_json import parse_json_table, read_bounded
from fedmerge.core.tensor_files import read_tensors
from fedmerge.deploy.deployment import read_deployment, scaled
from fedmerge.deploy.federation import Terms, is_tombstone, read_federation, terms_of
from fedmerge.experiment.record import RoundRecord, RunRecord, Scores, to_plain
from fedmerge.experiment.serving import Serving, frozen_draw, recipe_table
from fedmerge.exporting.files import arriving
from fedmerge.onboarding import Server, server_of_folder
from fedmerge.onboarding.server import network_of, refuse_damaged

NOTE, TENSORS = "offer.json", "models.safetensors"
FORMAT = "fedmerge offer 1"
FEWEST = 3
"""Sites whose mean row is told: of two, each could work out the other's."""


@dataclass(frozen=True)
class OfferNote:
    """What is told beside the models.

    Attributes:
        run: Identity of the run.
        federation: What it is called.
        round: That the models are of.
        num_params: P of the network.
        terms: What the sites agreed on, from `Terms.plain`.
        frozen_draw: Hash of what the network drew and never trains; empty for nothing.
        versions: That the run was made with.
        format: Of this file.
    """

    run: str
    federation: str
    round: int
    num_params: int
    terms: Mapping[str, Any]
    frozen_draw: str = ""
    versions: Mapping[str, Any] = field(default_factory=dict)
    format: str = FORMAT


@dataclass(frozen=True)
class Offered:
    """What was written.

    Attributes:
        folder: Where.
        files: Their names.
        has_mean_row: Whether the mean of the known sites' merging weights is told.
    """

    folder: Path
    files: tuple[str, ...]
    has_mean_row: bool


@dataclass(frozen=True)
class Offer:
    """An offer, read back and checked.

    Attributes:
        folder: Where it was.
        note: Beside the models.
        terms: Of the note.
        server: As onboarding knows a run.
    """

    folder: Path
    note: OfferNote
    terms: Terms
    server: Server


# ---------------------------------------------------------------- the server's side


def make_offer(run_folder: Path | str, out: Path | str) -> Offered:
    """Writes an offer for newcomers from a deployed run.

    Args:
        run_folder: ``run`` in the folder of a federation.
        out: Created; must be empty.

    Raises:
        UsageError: if it is no deployed run, its method keeps no whole models on the server, or `out` is not empty.
        FedmergeError: if the run is not finished or damaged.
    """
    run, out = Path(run_folder), Path(out)
    deployment = read_deployment(run)
    if deployment is None:
        raise UsageError(f"{run} is no deployed run; give the folder `run` of a federation")
    federation = read_federation(run.parent)
    if federation.terms.digest != deployment.terms:
        raise UsageError(
            f"{run} was run under other terms than {run.parent} holds now; put the old federation.toml back"
        )
    terms = scaled(federation, deployment).terms
    if terms.schema.kind != "classes":
        raise UsageError(f"this federation learns {terms.schema.kind}; newcomers are offered models of classes alone")
    server = server_of_folder(run, terms.model)
    tensors = {"models": server.models, "blocks": server.blocks}
    row = {} if isinstance(terms.method, DpFedMerge) else mean_row(server)  # whose promise does not cover the rows
    note = OfferNote(
        run=deployment.run,
        federation=federation.deploy.name,
        round=server.record.selected().round,
        num_params=server.record.num_params,
        terms=terms.plain(),
        frozen_draw=frozen_draw(server.module) or "",
        versions={name: value for name, value in server.record.versions.items() if name != "machine"},
    )
    with arriving(out) as part:
        content = save({name: t.contiguous().clone() for name, t in {**tensors, **row}.items()}, {"format": "pt"})
        write_atomically(part / TENSORS, content, private=True)
        write_atomically(part / NOTE, json.dumps(to_plain(note), indent=1) + "\n", private=True)
        write_atomically(part / "README.md", _card(note, len(server.models), row), private=True)
    return Offered(out, ("README.md", TENSORS, NOTE), bool(row))


def mean_row(server: Server) -> dict[str, Tensor]:
    """``mean_row`` [G, d] over the known sites that were not forgotten; nothing where there are too few or no rows."""
    if server.rows is None:
        return {}
    known = [i for i, name in enumerate(server.record.client_names) if not is_tombstone(name)]
    return {"mean_row": server.rows[:, known].mean(dim=1)} if len(known) >= FEWEST else {}


def _card(note: OfferNote, count: int, row: Mapping[str, Tensor]) -> str:
    told = (
        "the mean of the merging weights of all known sites, over three sites at least"
        if row
        else "nothing of the known sites' merging weights"
    )
    return f"""# An offer of the federation {note.federation}

Made by fedmerge {__version__} for a site that did not take part. With it and labelled examples of its own, which stay
on its machine, the site makes a model of its own; nobody else needs to do or to know anything.

## What is in it

- `{TENSORS}`: {count} model(s) of the server after round {note.round}, which layers share merging weights, and {told}.
- `{NOTE}`: method, network, training and form of the data as all sites agreed on them, identity and round of the run,
  versions of the libraries.

## What is not in it

No site's name, key, merging weights, numbers of examples, classes or scores, and no site's example. So a newcomer is
not told which site is like it, cannot begin at that site's merging weights, and is not compared with others.

## What it may still tell

The models were trained on the sites' examples and may tell of all of them together, as they do to every site that takes
part. Whoever has this folder has these models: give it to those who may have them. Its files can hold numbers and text
only; nothing in them is run.
"""


# ---------------------------------------------------------------- the newcomer's side


def read_offer(folder: Path | str, *, model: Any = None) -> Offer:
    """An offer that somebody sent, checked; nothing in it can execute code.

    Args:
        folder: Of the offer.
        model: The network (recipe, module or function), where it is a file of the federation's own (``import``).

    Raises:
        UsageError: if the folder is no offer, or the network must be given and is not.
        FedmergeError: if a file is damaged.
    """
    folder = Path(folder)
    if not (folder / NOTE).is_file():
        raise UsageError(f"{folder} is no offer: it has no {NOTE}; the server makes one with `fedmerge deploy offer`")
    note = _read_note(folder / NOTE)
    try:
        terms = terms_of(note.terms)
        form = terms.schema.form
    except UsageError as error:
        raise _damaged(folder / NOTE, str(error)) from error
    plain = None if model is not None else note.terms.get("model")
    serving = Serving(plain and dict(plain), terms.training, terms.options, form, note.frozen_draw or None)
    record = _record(note, terms)
    network = network_of(record, serving, folder, model)
    serving = replace(serving, model=recipe_table(network.recipe) if network.recipe is not None else None)
    tensors = read_tensors(folder / TENSORS, name=str(folder / TENSORS))
    blocks, row = tensors.get("blocks"), tensors.get("mean_row")
    if {*tensors} - {"mean_row"} != {"models", "blocks"} or blocks is None:
        raise _damaged(folder / TENSORS, f"it holds {', '.join(sorted(tensors))}; expected models and blocks")
    # the checks of a run's merging weights hold for one row too
    logits = torch.zeros(len(blocks), 1, len(tensors["models"]), dtype=torch.float64)
    checked = {"models": tensors["models"], "blocks": blocks, "soup.logits": logits}
    refuse_damaged(checked, replace(record, client_names=("",)), folder / TENSORS, network.size)
    if tensors["models"].dtype != terms.options.dtype:
        raise _damaged(folder / TENSORS, f"models are {tensors['models'].dtype}; expected {terms.options.dtype}")
    if row is not None and not _is_row(row, len(blocks), len(tensors["models"])):
        raise _damaged(folder / TENSORS, "mean_row does not hold shares that add up to 1 for each group of layers")
    server = Server(
        models=tensors["models"],
        rows=None,
        blocks=blocks,
        module=network.module,
        layout=network.layout,
        serving=serving,
        record=record,
        label_column=terms.schema.label_column,
        text_column=terms.schema.text_column,
        recipe=network.recipe,
        kept=network.kept,
        mean_row=row,
    )
    return Offer(folder, note, terms, server)


def _is_row(row: Tensor, groups: int, count: int) -> bool:
    if row.dtype != torch.float64 or tuple(row.shape) != (groups, count):
        return False
    sums = row.sum(dim=1)
    return bool((row >= 0).all()) and bool(((sums - 1).abs() < 1e-6).all())


def _damaged(path: Path, why: str) -> FedmergeError:
    return FedmergeError(f"{path} is damaged: {why}; ask for the offer again")


def _read_note(path: Path) -> OfferNote:
    faults: list[str] = []
    try:
        plain = parse_json_table(read_bounded(path))
    except ValueError as error:
        raise _damaged(path, str(error)) from error
    if plain.get("format") != FORMAT:
        faults.append(f"format: got {plain.get('format')!r}; expected {FORMAT!r}")
    note = None if faults else build_options(OfferNote, plain, NOTE, faults)
    if note is None or note.round < 0 or note.num_params < 1:
        raise _damaged(path, together(faults) if faults else "a number is out of range")
    return note


def _record(note: OfferNote, terms: Terms) -> RunRecord:
    """A run of which no client is known."""
    line = RoundRecord(note.round, (), 0.0, 0, 0, 0, 0, {}, test=Scores((), ()))
    plain = terms.plain()
    return RunRecord(
        label=note.federation,
        method=plain["method"]["name"],
        options={name: value for name, value in plain["method"].items() if name != "name"},
        seed=terms.options.seed,
        status="finished",
        client_names=(),
        groups=None,
        num_train=(),
        num_validation=(),
        num_test=(),
        class_names=terms.schema.class_names,
        num_params=note.num_params,
        setting=f"{plain['model']['name']}, an offer to newcomers",
        data_sha256="",
        versions=note.versions,
        rounds=(line,),
        select="last",
    )
