"""A site's own examples: read, checked against the form that all sites share, cut and scaled."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fedmerge.core.errors import DataError, FedmergeError, UsageError, unknown_name
from fedmerge.core.text import shortened
from fedmerge.data.byo import client_tables, texts_of_pair
from fedmerge.data.encoding import Encoder
from fedmerge.data.federated import ClientData, Examples, FederatedData, check_federation
from fedmerge.data.form import TOKENS, InputForm
from fedmerge.data.own_files import tables_of_path
from fedmerge.data.own_splits import Rows, cut_splits
from fedmerge.data.own_texts import learned_from
from fedmerge.data.partition import SPLITS, Split
from fedmerge.data.readers import Tables
from fedmerge.data.sides import side_shares
from fedmerge.data.table import Table, are_numbers
from fedmerge.deploy.reach import Finding
from fedmerge.deploy.schema import DataSchema

if TYPE_CHECKING:
    from fedmerge.deploy.site import SiteConfig

log = logging.getLogger(__name__)


def site_client(site: SiteConfig, schema: DataSchema, *, seed: int, encoder: Encoder | None = None) -> ClientData:
    """The site's examples as the federation's networks know them.

    For a file that `from_folder` would make a client of this name from, the same bits.

    Args:
        site: Says where the examples are.
        schema: The form that all sites share.
        seed: Decides the cut of splits that the site does not bring.
        encoder: Of the language model that is to read texts.

    Raises:
        UsageError: if there is no such file, data set or function, or the federation's scale is not known yet.
        DataError: naming the file and row that are wrong.
    """
    form = schema.form
    cut = _cut_rows(site, schema, seed, encoder, site_tables(site, schema))
    return _client(site.name, cut, form.scaled)


def raw_client(site: SiteConfig, schema: DataSchema, *, seed: int, encoder: Encoder | None = None) -> ClientData:
    """The same examples before they are scaled: what `moments` are taken of.

    Args:
        site: As for `site_client`, like all that follow.
        schema: Its scale may still be unknown.
        seed: Decides the cut.
        encoder: Of texts.

    Raises:
        UsageError: as `site_client`.
        DataError: as `site_client`.
    """
    cut = _cut_rows(site, schema, seed, encoder, site_tables(site, schema))
    return _client(site.name, cut, torch.from_numpy)


def _client(name: str, cut: Rows, made: Callable[[NDArray[Any]], torch.Tensor]) -> ClientData:
    examples = {split: Examples(made(cut[split][0]), torch.from_numpy(cut[split][1])) for split in SPLITS}
    return ClientData(name, examples["train"], examples["validation"], examples["test"])


def _cut_rows(site: SiteConfig, schema: DataSchema, seed: int, encoder: Encoder | None, given: Tables) -> Rows:
    """Checked rows of all splits, before they are scaled."""
    shares = side_shares(schema.validation, schema.test, "the federation's data")
    if not len(given["train"].labels):
        raise DataError(f"{given['train'].origin} has no rows; expected one to train on at least")
    tables = [fitted(table, schema) for table in given.values()]
    if encoder is not None and schema.dtype == TOKENS and encoder.kind != schema.kind:
        raise UsageError(f"the model reads texts for {encoder.kind}; the federation's data are {schema.kind}")
    names = schema.class_names
    learned = learned_from([by_name(table, names) for table in tables], encoder, names)
    own: Rows = {
        split: (owned(inputs), targets)
        for split, inputs, targets in zip(given, learned.inputs, learned.targets, strict=True)
    }
    if own["train"][0].shape[1:] != schema.shape:
        raise DataError(
            f"{tables[0].origin}: the encoder makes texts of {own['train'][0].shape[1]} tokens; the federation has "
            f"{schema.shape[0]}: set model.max_length as the federation does"
        )
    cut = cut_splits(site.name, own, shares, seed)
    checked = _client(site.name, cut, torch.from_numpy)
    check_federation(FederatedData((checked,), names, kind=schema.kind))
    return cut


def owned(inputs: NDArray[Any]) -> NDArray[Any]:
    """An array that torch can take over: a site's function may give one that is read-only or runs backwards."""
    return np.require(inputs, requirements=["C", "W"])


# --- where the examples are ---


def site_tables(site: SiteConfig, schema: DataSchema) -> Tables:
    """What the site has, by split, as it is given.

    Raises:
        UsageError: if there is no such file, data set or function.
        DataError: naming the file and row that are wrong.
    """
    readers = {"path": _of_path, "huggingface": _of_huggingface, "python": _of_python}
    return readers[site.data.place](site, schema)


def _of_path(site: SiteConfig, schema: DataSchema) -> Tables:
    path, own = Path(str(site.data.path)), site.data
    if own.text_column is not None and schema.dtype != TOKENS:
        raise UsageError("data.text_column: the federation reads no texts; leave it out")
    text_column = own.text_column or schema.text_column if schema.dtype == TOKENS else None
    if schema.dtype == TOKENS and text_column is None:
        raise UsageError("data.text_column: missing; the federation reads texts and does not say which column has them")
    return tables_of_path(path, own.label_column or schema.label_column, text_column, size=own.size)


def _of_huggingface(site: SiteConfig, schema: DataSchema) -> Tables:
    named = {"train": site.data.splits, "validation": site.data.validation_splits, "test": site.data.test_splits}
    return {split: _of_pool(site, schema, split, named[split]) for split in SPLITS if named[split] or split == "train"}


def _of_pool(site: SiteConfig, schema: DataSchema, split: Split, names: Sequence[str]) -> Table:
    from fedmerge.data.sources.huggingface import HuggingFace  # noqa: PLC0415 - brings a large library when it is used

    own = site.data
    pool = HuggingFace(
        path=str(own.huggingface),
        subset=own.subset,
        splits=tuple(names),
        input_column=own.input_column or (schema.text_column if schema.dtype == TOKENS else None),
        label_column=own.label_column,
        answer_column=own.answer_column,
        size=own.size,
        max_items=own.max_items if split == "train" else None,
    ).load()
    if schema.kind != "classes" and pool.answers is None:
        raise UsageError(f"data.answer_column: missing; the federation learns {schema.kind}, name the column with them")
    origin = f"{own.huggingface}{', ' if names else ''}{' and '.join(names)}"
    labels = np.array(pool.class_names, dtype=np.str_)[pool.targets] if pool.answers is None else pool.answers
    return Table(origin, pool.inputs, labels)


def _of_python(site: SiteConfig, schema: DataSchema) -> Tables:
    from fedmerge.models.imported import own_callable  # noqa: PLC0415 - brings every network

    path = str(site.data.python)
    function = own_callable(path, "data.python", "(inputs, labels) or three of these")
    try:
        made = function(**(site.data.options or {}))
    except FedmergeError:
        raise
    except Exception as error:  # whatever the site's function raises
        raise DataError(f"{path} failed: {type(error).__name__}: {shortened(str(error), 1000)}") from error
    return client_tables(f"{site.name}: {path}", made, texts_of_pair if schema.dtype == TOKENS else None)


# --- what all sites share ---


def fitted(table: Table, schema: DataSchema) -> Table:
    """The table in the schema's form: its columns in order, every input of the shape and type that it names."""
    is_text = table.inputs.dtype.kind == "U"
    if is_text != (schema.dtype == TOKENS):
        have, want = ("texts", "numbers") if is_text else ("numbers", "texts")
        raise DataError(f"{table.origin} holds {have}; the federation reads {want}: give this site's data in that form")
    if is_text:
        return table
    table = _coloured(_in_order(table, schema.columns), schema)
    if table.inputs.shape[1:] != schema.shape or table.inputs.dtype != schema.dtype:
        raise DataError(
            f"{table.origin}: inputs are {table.inputs.dtype} {list(table.inputs.shape[1:])}; the federation has "
            f"{schema.dtype} {list(schema.shape)}{_how_to_mend(table, schema)}"
        )
    return table


def _in_order(table: Table, columns: tuple[str, ...]) -> Table:
    """The table with the federation's columns in its order."""
    own = table.columns
    if not columns or own is None or own == columns:
        if own is not None and not columns:
            log.warning("%s: the federation names no columns; those of the file are taken in its order", table.origin)
        return table
    missing = [column for column in columns if column not in own]
    surplus = [column for column in own if column not in columns]
    if surplus:
        more = f" ({len(surplus) - 1} more are unknown alike)" if len(surplus) > 1 else ""
        wanted = missing or columns
        raise DataError(
            f"{table.origin}: {unknown_name('column', surplus[0], wanted)}{more}; rename it as the federation does, or "
            "leave it out if the federation does not have it"
        )
    if missing:
        listed = shortened(", ".join(map(repr, missing)), 1000)
        raise DataError(f"{table.origin} has no column {listed}; every site has all columns of the federation: add it")
    order = [own.index(column) for column in columns]
    return Table(table.origin, table.inputs[:, order], table.labels, table.numbers, table.unit, columns)


def _coloured(table: Table, schema: DataSchema) -> Table:
    """Grey images as colour ones, where the federation's are: three times the same channel."""
    shape = table.inputs.shape
    if schema.dtype != "uint8" or table.inputs.dtype != np.uint8 or shape[1:2] != (1,) or schema.shape[0] != 3:
        return table
    log.info("%s: grey images become colour ones, as the federation's are", table.origin)
    return Table(table.origin, np.repeat(table.inputs, 3, axis=1), table.labels, table.numbers, table.unit)


def _how_to_mend(table: Table, schema: DataSchema) -> str:
    if schema.dtype == "uint8" and table.inputs.dtype != np.uint8:
        return "; give whole numbers 0..255, (255 * x).round().astype('uint8') for x in 0..1"
    if table.inputs.dtype == np.uint8 and schema.dtype != "uint8":
        return "; give the floats that the federation's inputs are, scaled alike: x.astype('float32')"
    if len(schema.shape) == 3:
        return ", channels, height, width: scale this site's images (`size`), or move the channels to the front"
    return ": give as many features for each row"


def by_name(table: Table, names: tuple[str, ...]) -> Table:
    """Labels that are numbers as the names that they are, where the classes are called by other numbers than 0..K-1.

    A class called "3" that is the first of all is number 3 in a site's file, and not number 0.
    """
    if table.labels.dtype.kind not in "iu" or names == tuple(map(str, range(len(names)))):
        return table
    texts = table.labels.astype(np.str_)
    if not {*np.unique(texts).tolist()} <= {*names}:
        return table
    return Table(table.origin, table.inputs, texts, table.numbers, table.unit, table.columns)


# --- before the first round ---


FAR = 10.0
"""Standard deviations that a site's mean may lie from the federation's before its units are doubted."""


def check_site_data(site: SiteConfig, schema: DataSchema, seed: int, encoder: Encoder | None = None) -> list[Finding]:
    """What ``fedmerge deploy check`` says of a site's data; no fault is raised.

    Args:
        site: Says where the examples are.
        schema: The form that all sites share.
        seed: The run's.
        encoder: Of the language model that is to read texts.
    """
    try:
        given = site_tables(site, schema)
        cut = _cut_rows(site, schema, seed, encoder, given)
    except FedmergeError as error:
        return [Finding("data", ok=False, detail=str(error))]
    raw = _client(site.name, cut, torch.from_numpy)
    counts = ", ".join(f"{len(getattr(raw, split).targets):,} {split}" for split in SPLITS)
    place = f"{getattr(site.data, site.data.place)}"
    found = [Finding("data", ok=True, detail=f"{shortened(place)}: {counts} examples of the federation's form")]
    if schema.kind == "classes":
        found.append(_class_finding(raw, schema))
        found += _label_findings(given["train"], schema.class_names)
    if schema.dtype != TOKENS and schema.mean is not None:
        found.append(_unit_finding(raw, schema.form))
    return found


def _class_finding(raw: ClientData, schema: DataSchema) -> Finding:
    """Which classes the site trains on; one alone can be meant, and is worth a word."""
    counts = np.bincount(raw.train.targets.numpy(), minlength=schema.num_classes)
    own = [f"{name} {count:,}" for name, count in zip(schema.class_names, counts.tolist(), strict=True) if count]
    alone = "; one class alone teaches a network to say nothing else" if len(own) == 1 else ""
    detail = f"{len(own)} of {schema.num_classes} classes to train on: {shortened(', '.join(own), 400)}{alone}"
    return Finding("classes", ok=True, detail=detail)


def _label_findings(table: Table, names: tuple[str, ...]) -> list[Finding]:
    """Numbers where classes have names: what they are taken for is said, as 0 and 1 often mean the reverse."""
    are_places = are_numbers(table.labels) and not {*table.labels.astype(np.str_).tolist()} <= {*names}
    if are_places and names != tuple(map(str, range(len(names)))):
        meant = ", ".join(f"{number} = {name!r}" for number, name in enumerate(names))
        detail = (
            f"numbers, taken as places in class_names: {shortened(meant, 300)}; write the names if they mean others"
        )
        return [Finding("labels", ok=True, detail=detail)]
    return []


def _unit_finding(raw: ClientData, form: InputForm) -> Finding:
    """Whether the site's numbers are in the federation's units, as far as their means tell."""
    doubt = doubt_of_units(form.scaled(raw.train.inputs.numpy()), form)
    if doubt.is_far:
        return Finding(
            "units", ok=False, detail=f"{doubt.text}: is it in other units here? Convert it as the others do"
        )
    return Finding("units", ok=True, detail=f"{doubt.text}, the farthest of all")


class UnitDoubt(NamedTuple):
    """How far the numbers of some rows lie from the federation's.

    Attributes:
        is_far: Whether another unit is likelier than another site.
        text: Which feature or channel is the farthest off, and how far.
    """

    is_far: bool
    text: str


def doubt_of_units(scaled: torch.Tensor, form: InputForm) -> UnitDoubt:
    """Compares means with the federation's.

    Args:
        scaled: [n, ...] inputs in standard deviations from the federation's mean.
        form: Of the inputs.
    """
    means = scaled.double().mean(dim=(0, 2, 3) if scaled.dim() == 4 else 0).flatten()
    worst = int(means.abs().argmax())
    name = repr(form.columns[worst]) if form.columns else f"{'channel' if scaled.dim() == 4 else 'feature'} {worst}"
    text = f"the mean of {name} is {float(means[worst]):+.1f} standard deviations from the federation's"
    return UnitDoubt(not float(means.abs()[worst]) <= FAR, text)
