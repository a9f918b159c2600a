"""A site's own model in use: read back from its folder, and what it says of further examples."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedmerge.core.ensemble import Personal, outputs_of
from fedmerge.core.errors import DataError, FedmergeError, UsageError, unknown_name
from fedmerge.core.tensor_files import Forms, read_tensors
from fedmerge.core.vector import Layout, layout_of
from fedmerge.data import Examples
from fedmerge.data.form import TOKENS
from fedmerge.data.npz import read_arrays
from fedmerge.data.own_files import tables_of_path
from fedmerge.data.own_texts import learned_from
from fedmerge.data.readers import frame_table, frame_texts, refuse_other_separator
from fedmerge.data.table import Table, make_table, text_table
from fedmerge.deploy.federation import Terms, terms_of
from fedmerge.deploy.replacing import put_back
from fedmerge.deploy.site_data import by_name, doubt_of_units, fitted, owned
from fedmerge.deploy.site_model import FOLDER, NOTE, ModelNote, client_of_note, read_note
from fedmerge.deploy.trees import tree_from
from fedmerge.experiment.federation import encoder_of, make_module
from fedmerge.experiment.serving import Serving, frozen_draw, refuse_larger
from fedmerge.experiment.simulation import one_thread
from fedmerge.exporting import KINDS, Client, Exported, export_client
from fedmerge.exporting.ensembles import DRAWN, TENSORS, drawn_factors, member_prefix, vectors_of
from fedmerge.models._adapted import Adapted
from fedmerge.training import one_pass
from fedmerge.training.scores import tally

log = logging.getLogger(__name__)

_AT_ONCE = 512
"""Rows in one forward pass."""
_SERVER_KINDS = ("mergekit",)
"""Kinds of export that need the server's models."""


class Predictions(NamedTuple):
    """What a model says of n rows.

    Attributes:
        names: [n] the likeliest class of each.
        probabilities: [n, K] in the order of the model's classes.
    """

    names: tuple[str, ...]
    probabilities: Float[Tensor, "n K"]


class Scored(NamedTuple):
    """How a model does on labelled rows.

    Attributes:
        accuracy: Share of right answers, 0..1.
        loss: Mean loss in nats.
        num_rows: That were looked at.
    """

    accuracy: float
    loss: float
    num_rows: int


@dataclass(frozen=True)
class SiteModel:
    """A site's model, ready to use.

    Attributes:
        folder: Where it was read.
        note: What is known of it.
        terms: Of the note.
        client: The model as `fedmerge.exporting` knows it.
    """

    folder: Path
    note: ModelNote
    terms: Terms
    client: Client

    @property
    def class_names(self) -> tuple[str, ...]:
        """[K] in the order of the outputs."""
        return self.note.class_names

    def module(self) -> nn.Module:
        """The network or networks, in evaluation mode."""
        return self.client.module()

    def predict(self, data: Any) -> Predictions:
        """Classes of raw rows, with their probabilities.

        Args:
            data: Path of a .npz (its ``x``), .csv or .parquet file, where a column of labels does not count; or
                arrays or texts as they are in the federation's raw data.

        Raises:
            UsageError: if there is no such file, or the model answers with tags or texts.
            DataError: naming the file and row that are not of the federation's form.
        """
        kind = self.terms.schema.kind
        if kind != "classes":
            raise UsageError(
                f"this model learned {kind}, not one class for each row; export it as 'peft' and load that"
            )
        examples = self._examples(self._unlabelled(data))
        self._warn_of_units(examples)
        with one_thread(), torch.no_grad():
            parts = [self._outputs(piece) for piece in torch.split(examples.inputs, _AT_ONCE)]
        outputs = torch.cat(parts) if parts else torch.empty(0, len(self.class_names))
        probabilities = outputs.softmax(dim=1)
        return Predictions(tuple(self.class_names[k] for k in outputs.argmax(dim=1).tolist()), probabilities)

    def score(self, data: Any) -> Scored:
        """How the model does on labelled rows.

        Args:
            data: Path of a file or folder as a site's own examples are, all of whose rows count; (inputs, labels) as
                they are in the federation's raw data; or `Examples`, which are scaled already.

        Raises:
            UsageError: if there is no such file.
            DataError: naming the file and row that are not of the federation's form.
        """
        examples = data if isinstance(data, Examples) else self._examples(*self._labelled(data))
        if not len(examples.targets):
            raise DataError("no rows at all; expected one labelled row at least")
        with one_thread():
            setup = self.client.trained.setup
            found = setup.engine.map(tally, [(self.client.personal, one_pass(examples))])[0]
        return Scored(float(found.right / found.count), float(found.loss / found.count), int(found.count))

    def export(self, kind: str | None, out: Path | str) -> Exported:
        """Writes the model for other programs, with a card.

        Args:
            kind: One of `fedmerge.exporting.KINDS` but ``mergekit``, which mixes the server's models; the usual one of
                the network if None.
            out: Created; must be empty.

        Raises:
            UsageError: if the kind does not exist or does not fit, or the folder is not empty.
        """
        own = [each for each in KINDS if each not in _SERVER_KINDS]
        if kind in _SERVER_KINDS:
            raise UsageError(
                f"kind {kind!r} is made of the server's models, which a site has not; take {', '.join(own)}"
            )
        if kind is not None and kind not in own:
            raise UsageError(unknown_name("kind", kind, own))
        return export_client(self.client, Path(out), kind)

    def _warn_of_units(self, examples: Examples) -> None:
        schema = self.terms.schema
        if schema.dtype == TOKENS or schema.mean is None or not len(examples.inputs):
            return
        doubt = doubt_of_units(examples.inputs, schema.form)
        if doubt.is_far:
            log.warning("%s: are the rows in other units than those that the model learned from?", doubt.text)

    def _outputs(self, inputs: Tensor) -> Tensor:
        return outputs_of(self.client.personal, inputs, lambda vector, rows: self.client.module_of(vector)(rows))

    def _examples(self, *tables: Table) -> Examples:
        """Rows as the network is given them."""
        schema = self.terms.schema
        encoder = encoder_of(self.terms.model)
        rows = [by_name(fitted(table, schema), schema.class_names) for table in tables]
        learned = learned_from(rows, encoder, schema.class_names)
        inputs = torch.cat([schema.form.scaled(owned(part)) for part in learned.inputs])
        targets = torch.cat([torch.from_numpy(part) for part in learned.targets])
        if inputs.is_floating_point():
            inputs = inputs.to(self.terms.options.dtype)
        if inputs.dim() == 4:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        return Examples(inputs, targets)

    @property
    def _text_column(self) -> str | None:
        return self.terms.schema.text_column if self.terms.schema.dtype == TOKENS else None

    def _labelled(self, data: Any) -> list[Table]:
        schema = self.terms.schema
        if isinstance(data, (str, Path)):
            return list(tables_of_path(Path(data), schema.label_column, self._text_column).values())
        if not isinstance(data, (tuple, list)) or len(data) != 2:
            raise UsageError(f"got a {type(data).__name__}; expected a path, (inputs, labels) or Examples")
        return [_table(data[0], data[1])]

    def _unlabelled(self, data: Any) -> Table:
        """Rows with the first class for each, which nobody looks at."""
        if isinstance(data, (str, Path)):
            return self._of_file(Path(data))
        if len(data) == 0:
            raise DataError("rows: none at all; expected one at least")
        return _table(data, np.zeros(len(data), dtype=np.int64))

    def _of_file(self, path: Path) -> Table:
        if not path.is_file():
            raise UsageError(f"no such file: {path}; expected rows in a .npz, .csv or .parquet file")
        if path.suffix == ".npz":
            arrays = read_arrays(path)
            if "x" not in arrays:
                raise DataError(f"{path} has no array 'x'; it has {', '.join(sorted(arrays)) or 'none'}")
            return make_table(str(path), arrays["x"], np.zeros(len(arrays["x"]), dtype=np.int64))
        if path.suffix not in (".csv", ".parquet"):
            raise UsageError(f"{path}: {unknown_name('file ending', path.suffix, ('.npz', '.csv', '.parquet'))}")
        return _of_frame(path, self.terms.schema.label_column, self._text_column)


def _table(inputs: Any, labels: Any) -> Table:
    if len(inputs) and isinstance(inputs[0], str):
        return text_table("rows", inputs, labels)
    return make_table("rows", inputs, labels)


def _of_frame(path: Path, label_column: str, text_column: str | None) -> Table:
    """A table's rows without their labels."""
    import pandas as pd  # noqa: PLC0415 - takes a second to import

    try:
        if path.suffix == ".csv":
            cells = None if text_column is None else str
            frame = pd.read_csv(
                path, encoding="utf-8-sig", skipinitialspace=True, dtype=cells, keep_default_na=cells is None
            )
        else:
            frame = pd.read_parquet(path, engine="pyarrow")
    except (ValueError, OSError, ImportError) as error:
        raise DataError(f"{path} cannot be read ({error}); expected a table with a header") from error
    refuse_other_separator(str(path), [str(name) for name in frame.columns])
    frame = frame.drop(columns=label_column, errors="ignore")
    frame[label_column] = 0
    if text_column is not None:
        return frame_texts(frame, label_column, text_column, str(path))
    return frame_table(frame, label_column, str(path))


# ---------------------------------------------------------------- read back


def read_site_model(folder: Path | str, *, model: Any = None) -> SiteModel:
    """A site's model from its folder; nothing in it can execute code.

    Args:
        folder: The model's, or the site's, whose ``model`` is meant.
        model: The network again (recipe, module or function), where it is a file of the user's own (``import``).

    Raises:
        UsageError: if there is no model, or the network must be given and is not.
        FedmergeError: if a file is damaged.
    """
    folder = Path(folder)
    if folder.name == FOLDER or not (folder / NOTE).is_file():
        put_back(folder if folder.name == FOLDER else folder / FOLDER)
    if not (folder / NOTE).is_file() and (folder / FOLDER / NOTE).is_file():
        folder = folder / FOLDER
    note = read_note(folder)
    terms = _terms(note, folder, model)
    module = _module(note, terms, folder)
    layout = layout_of(module, head=terms.options.head, frozen=terms.options.frozen)
    module, personal = _read_personal(note, terms, module, layout, folder)
    return SiteModel(folder, note, terms, client_of_note(note, terms, module, layout, personal))


def _terms(note: ModelNote, folder: Path, model: Any) -> Terms:
    try:
        terms = terms_of(note.terms)
    except UsageError as error:
        raise FedmergeError(f"{folder / NOTE} is damaged: {error}") from error
    if terms.schema.class_names != note.class_names:
        raise FedmergeError(f"{folder / NOTE} is damaged: its class names are not those of its terms")
    if model is not None:
        return replace(terms, model=model)
    if note.terms.get("model", {}).get("name") == "import":
        raise UsageError(
            f"{folder}: its network is of your own and not in the folder; give it again: model=YOUR_MODULE in Python"
        )
    return terms


def _module(note: ModelNote, terms: Terms, folder: Path) -> nn.Module:
    """The network with fresh weights; refused before it is made if the file is too small to hold its values."""
    options, schema, path = terms.options, terms.schema, folder / TENSORS
    if not path.is_file():
        raise FedmergeError(f"{folder} has no {TENSORS}; get the model again")
    plain = note.terms["model"]
    serving = Serving(dict(plain), terms.training, options, schema.form, note.frozen_draw or None)
    refuse_larger(serving, schema.input_shape, schema.num_classes, path.stat().st_size, folder)
    data = schema.without_examples([note.site])
    return make_module(terms.model, data, options.seed, dtype=options.dtype)


def _read_personal(
    note: ModelNote, terms: Terms, module: nn.Module, layout: Layout, folder: Path
) -> tuple[nn.Module, Personal]:
    """The network with all values that the file holds, and the model."""
    form, path = list(note.form), folder / TENSORS
    fields = None if form == ["tensor"] else _fields_of(form, terms, path)
    found = _tensors(path, module, layout, fields)
    with torch.no_grad():
        for name, factor in drawn_factors(module).items():
            factor.copy_(found.tensors[DRAWN + name])
    if (frozen_draw(module) or "") != note.frozen_draw:
        raise FedmergeError(f"{path} is damaged: its frozen factors are not those of {NOTE}; get the model again")
    vectors = vectors_of(found.tensors, found.networks, layout)
    if not isinstance(module, Adapted):
        prefix = member_prefix(0) if found.networks else ""
        module = copy.deepcopy(module)
        module.load_state_dict({name: found.tensors[prefix + name] for name in _own_forms(module, layout)})
    if fields is None:
        return module, vectors[0]
    leaves = [torch.stack(vectors) if name == "models" else found.tensors[f"ensemble.{name}"] for name in fields]
    return module, tree_from(form, leaves, modules=(type(terms.method).__module__,))


class _Found(NamedTuple):
    """Tensors of a file that has all it should, and the number of networks; 0 for a model that is one."""

    tensors: dict[str, Tensor]
    networks: int


def _tensors(path: Path, module: nn.Module, layout: Layout, fields: tuple[str, ...] | None) -> _Found:
    """What the file holds: each tensor of every network, drawn factors, and what combines several; no more.

    Args:
        path: Of the file.
        module: The network.
        layout: Of the module.
        fields: Of an ensemble; None for one network.

    Raises:
        FedmergeError: naming what is missing, superfluous or not finite.
    """
    tensors, own = read_tensors(path), _own_forms(module, layout)
    numbers = {name.split(".")[1] for name in tensors if name.startswith("networks.") and name.count(".") > 1}
    count = 0 if fields is None else len(numbers)
    combining = [f"ensemble.{name}" for name in fields or () if name != "models"]
    if fields is not None and not (count and {*combining} <= {*tensors}):
        raise FedmergeError(f"{path} is damaged: it does not hold the parts of several networks; get the model again")
    prefixes = [""] if fields is None else [member_prefix(k) for k in range(count)]
    drawn = {DRAWN + name: (tuple(each.shape), each.dtype) for name, each in drawn_factors(module).items()}
    forms: Forms = {
        **{prefix + name: form for prefix in prefixes for name, form in own.items()},
        **{name: (tuple(tensors[name].shape), tensors[name].dtype) for name in combining},
        **drawn,
    }
    tensors = read_tensors(path, forms=forms)
    if any(tensor.is_floating_point() and not tensor.isfinite().all() for tensor in tensors.values()):
        raise FedmergeError(f"{path} is damaged: it holds numbers that are not finite; get the model again")
    return _Found(tensors, count)


def _own_forms(module: nn.Module, layout: Layout) -> Forms:
    """Shape and type of what one network's tensors are in the file."""
    tensors = layout.views(layout.read(module)) if isinstance(module, Adapted) else module.state_dict()
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def _fields_of(form: list[Any], terms: Terms, path: Path) -> tuple[str, ...]:
    """Names of the parts of an ensemble of this form.

    Raises:
        FedmergeError: if it is none.
    """
    blanks = [torch.empty(0)] * (len(form) - 1)
    tree = tree_from(form, blanks, modules=(type(terms.method).__module__,))
    fields: tuple[str, ...] = getattr(tree, "_fields", ())
    if "models" not in fields or not hasattr(tree, "combined"):
        raise FedmergeError(f"{path.parent / NOTE} is damaged: {form[0]!r} is no way to combine networks")
    return fields
