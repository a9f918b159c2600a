"""A new client's labelled samples, read, checked and scaled as the run's own clients were."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedmerge.core.errors import DataError, UsageError, unknown_name
from fedmerge.data import Examples
from fedmerge.data.encoding import encoded
from fedmerge.data.form import TOKENS, InputForm
from fedmerge.data.readers import READERS
from fedmerge.data.table import Table, align_columns, encode_labels, make_table, text_table
from fedmerge.experiment.federation import encoder_of
from fedmerge.onboarding.server import Server


def read_samples(
    data: Any, server: Server, *, label_column: str | None, what: str, classes: bool = False
) -> tuple[Server, dict[str, Examples]]:
    """The server for this client, and its samples by split: always ``train``; others if a file brings them.

    A client that brings its output layer has classes of its own: those of its samples, in the run's order if the run
    knows them all. Any other client has the run's classes.

    Args:
        data: `Examples`, which are scaled already; (inputs, labels) as they are in the raw data; or the path of a
            file, or of a folder with the files of this one client.
        server: Says which classes there are and how inputs look and are scaled.
        label_column: Of tables; the run's own by default.
        what: Begins messages, for example ``new client``.
        classes: Whether the server's classes are this client's already.

    Raises:
        UsageError: if it is none of these, or there is no such file.
        DataError: naming the file and row that are wrong.
    """
    if isinstance(data, (str, Path)):
        tables = _tables_of_path(Path(data), label_column or server.label_column, server.text_column)
        server = server if classes else _for_classes_of(tables.values(), server)
        return server, {split: _examples(table, server, raw=True) for split, table in tables.items()}
    if not isinstance(data, (tuple, list)) or len(data) != 2:
        raise UsageError(
            f"{what}: got a {type(data).__name__}; expected the path of a file or folder, (inputs, labels) or Examples"
        )
    _refuse_none(_length(data[1]), what)
    inputs, labels = data
    if isinstance(data, Examples) and server.kept and not classes:  # numbers of the run's classes
        labels = [server.record.class_names[int(k)] for k in data.targets]
    if _reads_texts(server) and len(inputs) > 0 and isinstance(inputs[0], str):
        table = text_table(what, inputs, labels)
    elif isinstance(data, Examples) and not data.inputs.is_floating_point():
        table = Table(what, data.inputs.numpy(), np.asarray(labels))
    else:
        table = make_table(what, inputs, labels)
    server = server if classes else _for_classes_of([table], server)
    return server, {"train": _examples(table, server, raw=not isinstance(data, Examples))}


def _for_classes_of(tables: Iterable[Table], server: Server) -> Server:
    """The server for a client with the classes of these tables, where it brings its own output layer."""
    if not server.kept:
        return server
    found = {str(label) for table in tables for label in table.labels.tolist()}
    known = server.record.class_names
    return server.for_classes(
        tuple(name for name in known if name in found) if found <= set(known) else tuple(sorted(found))
    )


def _length(labels: Any) -> int:
    try:
        return len(labels)
    except TypeError:
        return 1  # a lone label, which `make_table` refuses with its shape


def _refuse_none(count: int, where: str) -> None:
    if not count:
        raise DataError(f"{where}: no samples at all; expected one labelled sample at least")


def _tables_of_path(path: Path, label_column: str, text_column: str | None) -> dict[str, Table]:
    tables = [READERS[file.suffix](file, label_column, text_column) for file in _files(path)]
    splits = list(dict.fromkeys(split for found in tables for split in found))
    return {split: _joined([found[split] for found in tables if split in found]) for split in splits}


def _files(path: Path) -> list[Path]:
    accepted = ", ".join(READERS)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in READERS and not file.name.startswith("."))
        if not files:
            raise DataError(f"{path} has no {accepted} file; expected the new client's samples in one or several")
        return files
    if not path.exists():
        raise UsageError(f"no such file or folder: {path}; expected the new client's samples ({accepted})")
    if path.suffix not in READERS:
        raise UsageError(f"{path}: {unknown_name('file ending', path.suffix, READERS)}")
    return [path]


def _joined(tables: list[Table]) -> Table:
    """The rows of several files; each is checked against the first."""
    if len(tables) == 1:
        return tables[0]
    tables = align_columns(tables)
    texts = any(table.labels.dtype.kind == "U" for table in tables)
    labels = [table.labels.astype(np.str_) if texts else table.labels for table in tables]
    return Table(
        f"{tables[0].origin} and {len(tables) - 1} more",
        np.concatenate([table.inputs for table in tables]),
        np.concatenate(labels),
        columns=tables[0].columns,
    )


def _examples(table: Table, server: Server, *, raw: bool) -> Examples:
    _refuse_none(len(table.labels), table.origin)
    form = server.serving.form
    _, (targets,) = encode_labels([table], server.record.class_names)
    if _reads_texts(server):
        return Examples(_tokens(table, server), torch.from_numpy(targets))
    inputs = _raw_inputs(table, form) if raw and form is not None else torch.from_numpy(_floats(table, form))
    inputs = inputs.to(server.dtype)
    if inputs.dim() == 4:
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    return Examples(inputs, torch.from_numpy(targets))


def _reads_texts(server: Server) -> bool:
    return server.serving.form is not None and server.serving.form.dtype == TOKENS


def _tokens(table: Table, server: Server) -> torch.Tensor:
    """Texts as the run's own encoder makes them; tokens as they are."""
    if table.inputs.dtype.kind != "U":
        return torch.from_numpy(table.inputs)
    encoder = encoder_of(server.recipe)
    if encoder is None:
        raise DataError(f"{table.origin} holds texts; expected tokens, as the run's clients were given")
    return torch.from_numpy(encoded(table.inputs, None, encoder, (), table.at).inputs)


def _raw_inputs(table: Table, form: InputForm) -> torch.Tensor:
    """Scaled inputs, their columns in the run's order."""
    like = Table(
        "the run's clients", np.empty((0, *form.shape), form.dtype), np.empty(0, np.int64), columns=form.columns
    )
    return form.scaled(align_columns([like, table])[1].inputs)


def _floats(table: Table, form: InputForm | None) -> Any:
    """Inputs that are scaled already."""
    if table.inputs.dtype == np.uint8:
        raise DataError(
            f"{table.origin}: inputs are uint8; expected the floats that the run's clients trained on, scaled alike"
        )
    if form is not None and tuple(table.inputs.shape[1:]) != form.shape:
        raise DataError(
            f"{table.origin}: inputs are {list(table.inputs.shape[1:])}; expected {list(form.shape)} as at the run's "
            "clients"
        )
    return table.inputs
