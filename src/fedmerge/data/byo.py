"""Bring your own clients: arrays, a torch dataset, a data frame, or a folder with one file per client.

Clients are ordered by name. A split that is not given is cut from the client's train rows: the cut depends on the
seed and the client's name alone, and identical rows of a client land on one side.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from fedmerge.core.errors import DataError, UsageError, unknown_name
from fedmerge.core.text import shortened
from fedmerge.data.encoding import Encoder
from fedmerge.data.federated import ClientData, Examples, FederatedData, check_federation
from fedmerge.data.folder_options import FolderOptions
from fedmerge.data.form import input_form, token_form
from fedmerge.data.own_splits import Rows, cut_splits
from fedmerge.data.own_texts import Learned, learned_from, tasks_by_label
from fedmerge.data.partition import SPLITS, Split
from fedmerge.data.pool import Ints
from fedmerge.data.readers import READERS, Tables, frame_table
from fedmerge.data.sides import side_shares
from fedmerge.data.table import Table, align_columns, make_table, text_table
from fedmerge.data.transform import Scale, scale_of, standard_scale

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Plan:
    """How own data become a federation, whatever they came from."""

    validation: float
    test: float
    seed: int
    class_names: Sequence[str] | None
    standardise: bool
    by_label: bool = False
    encoder: Encoder | None = None


def from_arrays(
    clients: Mapping[str, Any] | Sequence[Any],
    *,
    validation: float = 0.15,
    test: float = 0.15,
    seed: int = 0,
    class_names: Sequence[str] | None = None,
    standardise: bool = False,
) -> FederatedData:
    """Clients from arrays, tensors or nested lists.

    Args:
        clients: Name -> client, or a list of clients. A client is ``(x, y)``, ``((x, y), (x, y), (x, y))`` for train,
            validation and test, or a table with the keys train, validation, test. x is [n, ...] numbers, or uint8
            images [n, c, h, w], which are normalised per channel; y is [n] class numbers or texts.
        validation: Share of a client's rows; for clients that do not bring their own validation rows.
        test: Share of a client's rows alike.
        seed: Decides the cut.
        class_names: [K]; found in the labels if not given.
        standardise: Scale every feature (image channel) by mean and standard deviation over all train rows.

    Raises:
        UsageError: if the shares leave nothing to train on.
        DataError: naming the client and row that are wrong.

    >>> data = from_arrays({"a": ([[0.0], [1.0], [2.0]], [0, 1, 0]), "b": ([[3.0], [4.0], [5.0]], [1, 1, 0])})
    >>> [len(client.test.targets) for client in data.clients], data.class_names
    ([1, 1], ('0', '1'))
    """
    named = clients if isinstance(clients, Mapping) else _numbered(clients)
    tables = {name: client_tables(name, client) for name, client in named.items()}
    return _assemble(tables, _Plan(validation, test, seed, class_names, standardise), "your arrays")


def from_dataset(
    dataset: Dataset[Any],
    users: Sequence[Hashable] | Callable[[int], Hashable],
    *,
    validation: float = 0.15,
    test: float = 0.15,
    seed: int = 0,
    class_names: Sequence[str] | None = None,
    standardise: bool = False,
) -> FederatedData:
    """Clients from a torch dataset of pairs (input, label) with a length; PIL images become [c, h, w].

    Args:
        dataset: Every item is read once and kept in memory.
        users: [n] the client of each item, or a function from an item's index to its client.
        validation: As for `from_arrays`, like all that follow.
        test: Share of a client's rows.
        seed: Decides the cut.
        class_names: [K].
        standardise: Scale every feature.

    Raises:
        DataError: naming the item that is wrong.
    """
    size = _length(dataset)
    if not callable(users) and len(users) != size:
        raise DataError(f"users has {len(users)} entries for {size} items; expected one for each")
    rows: dict[str, list[tuple[Any, Any]]] = defaultdict(list)
    for index in range(size):
        user = users(index) if callable(users) else users[index]
        rows[str(user)].append(_pair(dataset[index], index))
    tables: dict[str, Tables] = {
        name: {"train": make_table(f"client {name!r}", [x for x, _ in pairs], [y for _, y in pairs])}
        for name, pairs in rows.items()
    }
    return _assemble(tables, _Plan(validation, test, seed, class_names, standardise), "your dataset")


def from_frame(
    frame: pd.DataFrame,
    user_column: str,
    label_column: str,
    *,
    validation: float = 0.15,
    test: float = 0.15,
    seed: int = 0,
    class_names: Sequence[str] | None = None,
    standardise: bool = False,
) -> FederatedData:
    """Clients from a data frame: one column names the client, one the class, all others hold numbers.

    Args:
        frame: One row per item.
        user_column: Column with the client of each row.
        label_column: Column with the class of each row.
        validation: As for `from_arrays`, like all that follow.
        test: Share of a client's rows.
        seed: Decides the cut.
        class_names: [K].
        standardise: Scale every column.

    Raises:
        DataError: naming the column or row that is wrong.
    """
    names = [str(column) for column in frame.columns]
    if names.count(user_column) != 1:
        count = names.count(user_column)
        raise DataError(f"your frame has {count} columns called {user_column!r}; expected one among {', '.join(names)}")
    users = frame.iloc[:, names.index(user_column)]
    if users.isna().any():
        row = int(np.flatnonzero(users.isna())[0])
        raise DataError(f"your frame, row {row} from 0: no user in column {user_column!r}; expected one for every row")
    rest = frame.drop(columns=frame.columns[names.index(user_column)])
    places = {str(user): np.flatnonzero(users.astype(str) == user) for user in users.astype(str).unique()}
    tables: dict[str, Tables] = {
        user: {"train": frame_table(rest.iloc[rows], label_column, f"client {user!r}", rows)}
        for user, rows in places.items()
    }
    return _assemble(tables, _Plan(validation, test, seed, class_names, standardise), "your frame")


def from_folder(
    folder: FolderOptions | Path | str, *, seed: int = 0, encoder: Encoder | None = None, **options: Any
) -> FederatedData:
    """Clients from a folder with one file each.

    Args:
        folder: The folder, or its options.
        seed: Decides the cut.
        encoder: Of the language model that is to read texts.
        options: Fields of `FolderOptions`, if `folder` is a path.

    Raises:
        UsageError: if the folder or an option is wrong.
        DataError: naming the file and row that are wrong.
    """
    if not isinstance(folder, FolderOptions):
        folder = FolderOptions(path=str(folder), **options)
    elif options:
        raise UsageError(f"from_folder: got FolderOptions and {', '.join(options)}; put them into the options")
    files = _client_files(Path(folder.path))
    tables = {path.stem: READERS[path.suffix](path, folder.label_column, folder.text_column) for path in files}
    class_names, by_label = folder.class_names or None, folder.tasks == "by-label"
    plan = _Plan(folder.validation, folder.test, seed, class_names, folder.standardise, by_label, encoder)
    return _assemble(tables, plan, str(folder.path))


def from_texts(
    clients: Mapping[str, Any],
    encoder: Encoder,
    *,
    validation: float = 0.15,
    test: float = 0.15,
    seed: int = 0,
    class_names: Sequence[str] | None = None,
    tasks: Literal["one", "by-label"] = "one",
) -> FederatedData:
    """Clients from lists of texts.

    Args:
        clients: Name -> client. A client is ``(texts, labels)``, or a table with the keys train, validation and test.
            A label is a class; for a model that completes texts it is the completion, and for one that tags words it
            is one tag per word of the text, with spaces between them.
        encoder: Of the language model, ``Hf(...).encoder()``.
        validation: As for `from_arrays`, like those that follow.
        test: Share of a client's rows.
        seed: Decides the cut.
        class_names: [K].
        tasks: ``by-label`` gives clients without a common label different tasks.

    Raises:
        UsageError: if the shares leave nothing to train on.
        DataError: naming the client and row that are wrong.
    """
    tables = {name: client_tables(name, client, texts_of_pair) for name, client in clients.items()}
    plan = _Plan(validation, test, seed, class_names, False, tasks == "by-label", encoder)
    return _assemble(tables, plan, "your texts")


def _numbered(clients: Sequence[Any]) -> dict[str, Any]:
    digits = len(str(len(clients) - 1))
    return {f"client-{number:0{digits}d}": client for number, client in enumerate(clients)}


def client_tables(name: str, client: Any, made: Callable[[Any, str, Split], Table] | None = None) -> Tables:
    """One client as tables by split.

    Args:
        name: The client's, for messages.
        client: ``(x, y)``, three of these, or a table with the keys train, validation, test.
        made: Makes a table of one pair, `texts_of_pair` for texts; numbers are expected by default.

    Raises:
        DataError: naming the client and row that are wrong.
    """
    made = made or _table_of_pair
    if isinstance(client, Mapping):
        for key in client:
            if key not in SPLITS:
                raise DataError(f"client {name!r}: {unknown_name('split', key, SPLITS)}")
        splits = dict(client)
    elif isinstance(client, (tuple, list)) and len(client) == 3:
        splits = dict(zip(SPLITS, client, strict=True))
    else:
        splits = {"train": client}
    if "train" not in splits:
        raise DataError(f"client {name!r} has no train rows; expected at least the key 'train'")
    return {split: made(splits[split], name, split) for split in SPLITS if split in splits}


def _table_of_pair(pair: Any, name: str, split: Split) -> Table:
    return make_table(f"client {name!r}, {split}", *_checked_pair(pair, name, split))


def texts_of_pair(pair: Any, name: str, split: Split) -> Table:
    """A table from a pair (texts, labels)."""
    texts, labels = _checked_pair(pair, name, split)
    return text_table(f"client {name!r}, {split}", texts, labels)


def _checked_pair(pair: Any, name: str, split: Split) -> Any:
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise DataError(f"client {name!r}, {split}: got a {type(pair).__name__}; expected (inputs, labels)")
    return pair


def _length(dataset: Any) -> int:
    try:
        return len(dataset)
    except TypeError:
        raise DataError("your dataset has no length; expected one with len() and items by number") from None


def _pair(item: Any, index: int) -> tuple[Any, Any]:
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        raise DataError(f"your dataset, item {index}: got a {type(item).__name__}; expected a pair (input, label)")
    x, y = item
    if hasattr(x, "getbands"):  # a PIL image: [h, w] or [h, w, c]
        pixels = np.asarray(x)
        x = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return (x.detach().cpu().numpy() if isinstance(x, torch.Tensor) else np.asarray(x)), (
        y.item() if isinstance(y, torch.Tensor) else y
    )


def _client_files(folder: Path) -> list[Path]:
    accepted = ", ".join(READERS)
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder; expected one with a {accepted} file per client")
    present = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    files = [path for path in present if path.suffix in READERS and path.is_file()]
    if len(files) < len(present):
        others = ", ".join(path.name for path in present if path not in files)
        log.warning("%s: not read, because only %s files are clients: %s", folder, accepted, shortened(others, 1000))
    if not files:
        raise DataError(f"{folder} has no {accepted} file; expected one per client")
    stems = [path.stem for path in files]
    twice = next((path.name for path in files if stems.count(path.stem) > 1), None)
    if twice is not None:
        raise DataError(
            f"{folder}: two files are called {Path(twice).stem!r} but for their ending; a name is one client"
        )
    return files


def _assemble(clients: Mapping[str, Tables], plan: _Plan, source: str) -> FederatedData:
    """The federation: labels numbered, absent splits cut from train rows, inputs scaled."""
    shares = side_shares(plan.validation, plan.test, source)
    if not clients:
        raise DataError(f"{source}: no clients at all; expected at least one")
    named = {str(name): tables for name, tables in clients.items()}
    if len(named) < len(clients):
        raise DataError(f"{source}: two clients have one name once they are texts; expected different names")
    unwritable = [name for name in named if not name.isprintable()]
    if unwritable:
        raise DataError(f"{source}: a client is called {unwritable[0]!a}; expected a name of printable characters")
    keys = [(name, split) for name in sorted(named) for split in SPLITS if split in named[name]]
    tables = align_columns([named[name][split] for name, split in keys])
    learned = learned_from(tables, plan.encoder, plan.class_names)
    if learned.kind == "classes" and len(learned.class_names) < 2:
        raise DataError(f"{source}: every row has the class {learned.class_names[0]!r}; expected two classes at least")
    rows: dict[str, Rows] = {name: {} for name in sorted(named)}
    for (name, split), inputs, targets in zip(keys, learned.inputs, learned.targets, strict=True):
        rows[name][split] = (inputs, targets)
    cut = {name: cut_splits(name, own, shares, plan.seed) for name, own in rows.items()}
    data = _federation(cut, learned, plan, source, tables[0].columns)
    check_federation(data)
    return data


def _federation(
    cut: Mapping[str, Rows], learned: Learned, plan: _Plan, source: str, columns: tuple[str, ...] | None
) -> FederatedData:
    trained = np.concatenate([own["train"][0] for own in cut.values()])
    scale = None if learned.are_tokens else _scale(trained, plan.standardise, source)
    data = FederatedData(
        tuple(ClientData(name, *(_examples(own[split], scale) for split in SPLITS)) for name, own in cut.items()),
        learned.class_names,
        source=f"{source}, {len(cut)} clients",
        form=token_form(trained.shape[1]) if scale is None else input_form(trained, scale, columns),
        kind=learned.kind,
    )
    return tasks_by_label(data) if plan.by_label else data


def _scale(trained: NDArray[Any], standardise: bool, source: str) -> Scale:
    return standard_scale(trained) if standardise and trained.dtype != np.uint8 else scale_of(trained, source)


def _examples(rows: tuple[NDArray[Any], Ints], scale: Scale | None) -> Examples:
    inputs, targets = (torch.from_numpy(part) for part in rows)
    return Examples(inputs if scale is None else scale.apply(inputs), targets)
