"""What every site's examples look like: the ``[data]`` table of a federation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from fedmerge.core.errors import DataError, UsageError
from fedmerge.core.options import check_options, option
from fedmerge.core.text import brief
from fedmerge.data.encoding import Encoder, Kind
from fedmerge.data.federated import FederatedData, without_examples
from fedmerge.data.form import MOST_NUMBERS, TOKENS, InputForm, form_from_plain, input_form, token_form
from fedmerge.data.sides import side_shares


@dataclass(frozen=True)
class DataSchema:
    """The form that every site's examples have, so that no site sees another's rows and all train one network.

    >>> schema = DataSchema(class_names=("sick", "well"), shape=(3,), mean=(1.0, 2.0, 3.0), std=(1.0, 1.0, 2.0))
    >>> schema.num_classes, schema.form.std.tolist()
    (2, [1.0, 1.0, 2.0])
    """

    class_names: tuple[str, ...] = option(
        help="names of classes (or tags) 0..K-1; of completions one that stands for all"
    )
    shape: tuple[int, ...] = option(
        at_least=1, help="of one input: features; channels, height, width of images; tokens of a text"
    )
    dtype: Literal["float32", "uint8", "tokens"] = option(
        "float32", help="of raw inputs: numbers, images 0..255, or texts that a language model's encoder reads"
    )
    kind: Kind = option("classes", help="what is learned: one class per example, one tag per word, a completion")
    label_column: str = option("label", help="column of tables that holds the class")
    text_column: str | None = option(None, help="column of tables that holds texts; further columns do not count")
    columns: tuple[str, ...] = option((), help="names of the input columns in their order; sites may have any order")
    scale: Literal["given", "pooled"] = option(
        "given", help="given: by mean and std below; pooled: the server finds them from sums that every site sends"
    )
    mean: tuple[float, ...] | None = option(
        None, help="subtracted from raw inputs: one number, or one per feature or channel; nothing is scaled without it"
    )
    std: tuple[float, ...] | None = option(None, above=0, help="divided by, alike")
    validation: float = option(0.15, at_least=0, below=1, help="share of a site's rows for validation")
    test: float = option(0.15, at_least=0, below=1, help="share of a site's rows for the test")

    def __post_init__(self) -> None:
        check_options(self)
        faults = [*_class_faults(self), *_input_faults(self), *_scale_faults(self)]
        if faults:
            raise UsageError("\n".join(f"DataSchema.{fault}" for fault in faults))
        side_shares(self.validation, self.test, "DataSchema")

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.class_names)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of one input, for example (1, 28, 28)."""
        return self.shape

    @property
    def needs_moments(self) -> bool:
        """Whether the scale is still to be found from all sites' sums."""
        return self.scale == "pooled" and self.mean is None

    @property
    def form(self) -> InputForm:
        """The raw inputs and their scale.

        Raises:
            UsageError: while the scale is still to be found.
        """
        if self.needs_moments:
            raise UsageError("the scale of the inputs is not known yet: pool the sites' sums first, see `pooled`")
        return _form(self)

    def without_examples(self, names: Sequence[str]) -> FederatedData:
        """Clients of these names that have no examples: what a server knows of its sites.

        Raises:
            UsageError: while the scale is still to be found.
        """
        data = without_examples(names, self.class_names, self.form, self.kind)
        return replace(data, source=f"{len(names)} sites")

    def with_scale(self, mean: Sequence[float], std: Sequence[float]) -> DataSchema:
        """The schema with a scale that was found, see `fedmerge.deploy.moments.pooled`."""
        return replace(self, mean=tuple(mean), std=tuple(std))


def schema_of_form(
    form: InputForm,
    *,
    class_names: Sequence[str],
    kind: Kind = "classes",
    label_column: str = "label",
    text_column: str | None = None,
    validation: float = 0.15,
    test: float = 0.15,
) -> DataSchema:
    """The schema of inputs in a known form, for example of a federation that was simulated first.

    Args:
        form: Shape, type, columns and scale.
        class_names: [K].
        kind: What is learned.
        label_column: Of tables.
        text_column: Of tables that hold texts.
        validation: Share of a site's rows.
        test: Share of a site's rows.

    Raises:
        UsageError: naming what does not fit.
    """
    dtype: Any = form.dtype  # what it may be is checked
    scaled = form.dtype != TOKENS and (form.mean.dim() > 0 or form.mean.item() != 0 or form.std.item() != 1)
    return DataSchema(
        class_names=tuple(class_names),
        shape=form.shape,
        dtype=dtype,
        kind=kind,
        label_column=label_column,
        text_column=text_column,
        columns=form.columns or () if form.dtype != TOKENS else (),
        mean=tuple(form.mean.flatten().tolist()) if scaled else None,
        std=tuple(form.std.flatten().tolist()) if scaled else None,
        validation=validation,
        test=test,
    )


def schema_of_example(
    path: Path | str,
    *,
    label_column: str = "label",
    text_column: str | None = None,
    standardise: bool = False,
    scale: Literal["given", "pooled"] = "given",
    class_names: Sequence[str] = (),
    encoder: Encoder | None = None,
    size: int | None = None,
    validation: float = 0.15,
    test: float = 0.15,
) -> DataSchema:
    """The schema of one site's examples, or of a public sample that looks like them.

    Args:
        path: File or folder, see `fedmerge.data.own_files.tables_of_path`.
        label_column: Of tables.
        text_column: Of tables that hold texts.
        standardise: Scale every feature by this example's mean and standard deviation, over all its train rows.
            Images 0..255 always are, per channel.
        scale: ``pooled`` leaves the scale open: it is found from sums over all sites.
        class_names: All classes that any site has; those of the example by default.
        encoder: Of the language model that is to read texts.
        size: Images of a folder are scaled to this many pixels per side.
        validation: Share of a site's rows.
        test: Share of a site's rows.

    Raises:
        UsageError: if there is nothing at the path, or an option does not fit.
        DataError: naming the file and row that are wrong.
    """
    # only who makes a schema needs readers of files
    from fedmerge.data.own_files import tables_of_path  # noqa: PLC0415
    from fedmerge.data.own_texts import learned_from  # noqa: PLC0415
    from fedmerge.data.table import align_columns  # noqa: PLC0415
    from fedmerge.data.transform import scale_of, standard_scale  # noqa: PLC0415

    tables = align_columns(list(tables_of_path(Path(path), label_column, text_column, size=size).values()))
    learned = learned_from(tables, encoder, class_names or None)
    if learned.kind == "classes" and len(learned.class_names) < 2:
        raise DataError(
            f"{path}: every row has the class {learned.class_names[0]!r}; expected two classes at least. Give "
            "class_names if other sites have more"
        )
    trained = learned.inputs[0]
    if not len(trained):
        raise DataError(f"{path} has no train rows; expected one at least")
    if learned.are_tokens:
        if standardise or scale == "pooled":
            raise UsageError(f"{path} holds texts, which have no scale; leave standardise and scale out")
        form = token_form(trained.shape[1])
    else:
        floats = standardise and trained.dtype != "uint8"
        found = standard_scale(trained) if floats else scale_of(trained, str(path))
        form = input_form(trained, found, tables[0].columns)
    schema = schema_of_form(
        form,
        class_names=learned.class_names,
        kind=learned.kind,
        label_column=label_column,
        text_column=text_column,
        validation=validation,
        test=test,
    )
    return replace(schema, scale=scale, mean=None, std=None) if scale == "pooled" else schema


def _form(schema: DataSchema) -> InputForm:
    plain = {
        "shape": list(schema.shape),
        "dtype": schema.dtype,
        "mean": _nested(schema.mean, 0.0, schema.shape),
        "std": _nested(schema.std, 1.0, schema.shape),
        "columns": list(schema.columns) or None,
    }
    return form_from_plain(plain)


def _nested(values: Sequence[float] | None, absent: float, shape: tuple[int, ...]) -> Any:
    """Numbers as they broadcast to an input: one for all, [features], or [channels, 1, 1].

    >>> _nested((1.0, 2.0), 0.0, (2, 8, 8)), _nested(None, 0.0, (2, 8, 8))
    ([[[1.0]], [[2.0]]], 0.0)
    """
    if values is None:
        return absent
    if len(shape) == 3 and len(values) == shape[0]:
        return [[[value]] for value in values]
    if len(values) == 1 and shape != (1,):
        return values[0]
    return _folded(list(values), shape)


def _folded(values: list[Any], shape: tuple[int, ...]) -> list[Any]:
    """A flat list as nested lists of this shape."""
    for size in reversed(shape[1:]):
        values = [values[start : start + size] for start in range(0, len(values), size)]
    return values


def _class_faults(schema: DataSchema) -> list[str]:
    names, least = schema.class_names, 2 if schema.kind == "classes" else 1
    faults = []
    if len(names) < least or len({*names}) < len(names) or not all(name.strip() for name in names):
        faults.append(f"class_names: got {brief(names)}; expected {least} or more different names")
    if schema.kind != "classes" and schema.dtype != TOKENS:
        faults.append(f"kind: got {schema.kind!r} for inputs of type {schema.dtype}; only texts (tokens) have it")
    return faults


def _input_faults(schema: DataSchema) -> list[str]:
    shape, columns, faults = schema.shape, schema.columns, []
    if not shape or math.prod(shape) > MOST_NUMBERS:
        faults.append(f"shape: got {brief(shape)}; expected one size or more, {MOST_NUMBERS:,} numbers at most")
    if schema.dtype == "uint8" and len(shape) != 3:
        faults.append(f"shape: got {brief(shape)}; expected channels, height, width for uint8 images")
    if schema.dtype == TOKENS and len(shape) != 1:
        faults.append(f"shape: got {brief(shape)}; expected the number of tokens, as texts are read")
    if columns and (schema.dtype != "float32" or shape != (len(columns),) or len({*columns}) < len(columns)):
        faults.append(
            f"columns: got {len(columns)} for {schema.dtype} inputs of shape {list(shape)}; expected a name of its "
            "own for each feature, or none"
        )
    if schema.text_column is not None and schema.dtype != TOKENS:
        faults.append(f"text_column: got {schema.text_column!r} for {schema.dtype} inputs; leave it out")
    return faults


def _scale_faults(schema: DataSchema) -> list[str]:
    mean, std, shape = schema.mean, schema.std, schema.shape
    if (mean is None) != (std is None):
        return ["mean: got one of mean and std; expected both or neither"]
    if schema.dtype == TOKENS and (mean is not None or schema.scale == "pooled"):
        return ["scale: texts have none; leave scale, mean and std out"]
    if mean is None or std is None or not shape:
        return []
    counts = {1, math.prod(shape), *([shape[0]] if len(shape) == 3 else [])}
    if len(mean) not in counts or len(mean) != len(std):
        accepted = " or ".join(map(str, sorted(counts)))
        return [f"mean: got {len(mean)} numbers, and {len(std)} of std; expected {accepted} of each"]
    try:
        _form(schema)
    except DataError as error:  # a number that float32 cannot hold
        return [f"mean: {error}"]
    return []
