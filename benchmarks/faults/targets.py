"""What reads foreign input: for each kind good examples, a way to spoil them, and the reader.

A reader of a file format of its own needs one line: ``Target("checkpoint", (valid,), changed_bytes, read)``, where
``read(content)`` raises `FedmergeError` for what it refuses.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
import torch
from mutations import (
    Draws,
    changed_bytes,
    changed_json,
    changed_lines,
    changed_table,
    changed_tensors,
    hostile_value,
    one_of,
    typo,
)
from safetensors.torch import save

from fedmerge.algorithms import ALGORITHMS
from fedmerge.bench.result import Result, Ticket, to_line
from fedmerge.bench.store import result_from
from fedmerge.bench.suite_file import read_suite, suite_of
from fedmerge.core.errors import FedmergeError
from fedmerge.core.options import option_fields
from fedmerge.core.tensor_files import read_tensors
from fedmerge.data import PARTITIONS, SOURCES
from fedmerge.data.archive import read_deb_folder, read_tgz_folder, read_wheel_folder
from fedmerge.data.partition import partition_from
from fedmerge.data.readers import READERS
from fedmerge.experiment.checkpoint import MAGIC, Manifest, digest, packed, unpacked
from fedmerge.experiment.config import build_config, override, read_toml, to_table
from fedmerge.experiment.execute import execute_config
from fedmerge.experiment.record import rounds_from, run_from
from fedmerge.experiment.serving import serving_from
from fedmerge.models import NETWORKS

Table = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """One reader.

    Attributes:
        name: In the report.
        examples: Good input, at least one.
        change: Makes bad input of a good one.
        read: Raises `FedmergeError` for what it refuses, and nothing else.
        weight: How many of the cases it gets, relative to the others.
        names_keys: Whether a change of one value or key must be told by its name; then `change` gives a `Change` too.
    """

    name: str
    examples: tuple[Any, ...]
    change: Callable[[Draws, Any], Any]
    read: Callable[[Any], object]
    weight: int = 1
    names_keys: bool = False


SMALL: Table = {
    "partition": {"name": "rotations", "clients": 5, "groups": 2, "train": 10, "validation": 4, "test": 6},
    "model": {"name": "mlp", "hidden": [8]},
    "rounds": 1,
}


SUITE: Table = {
    "title": "Small",
    "seeds": [0, 1],
    "lr": [0.1, 0.3],
    "extensions": 1,
    "reference": "fedavg",
    "defaults": {"source": {"name": "digits"}, "model": {"name": "mlp", "hidden": [8]}, "rounds": 2},
    "settings": {"turned": {"title": "Turned", "partition": SMALL["partition"], "groups": 2}},
    "methods": {"fedavg": {"name": "fedavg"}, "ifca": {"name": "ifca", "told": "d"}},
    "goals": [{"key": "g", "setting": "turned", "left": "ifca", "right": ["fedavg"], "demand": 1.0}],
}


def _needed(cls: type) -> Table:
    """Texts for the options that have no default."""
    fields = {name: field for name, (field, _) in option_fields(cls).items()}
    return {name: "a.py:b" for name, field in fields.items() if field.default is dataclasses.MISSING}


def config_tables() -> tuple[Table, ...]:
    """A table with every option spelled out for each method, source, partition and network."""
    chosen: list[Table] = [{"method": name} for name in ALGORITHMS]
    for kind, registry in (("source", SOURCES), ("partition", PARTITIONS), ("model", NETWORKS)):
        chosen += [{kind: {"name": name, **_needed(registry[name].cls)}} for name in registry]
    chosen.append({"source": {"name": "folder", "path": "clients"}})
    return tuple(to_table(build_config({**SMALL, **table} if "source" not in table else table)) for table in chosen)


def changed_toml(draws: Draws, table: Table) -> bytes:
    """A configuration as a TOML file, changed as a table before or as bytes after it is written."""
    if draws.integers(2):
        return changed_bytes(draws, tomli_w.dumps(table).encode())
    try:
        return tomli_w.dumps(changed_table(draws, table)[0]).encode()
    except (TypeError, ValueError, AttributeError, RecursionError):  # TOML cannot say it
        return changed_bytes(draws, tomli_w.dumps(table).encode())


def changed_words(draws: Draws, table: Table) -> tuple[Table, list[str]]:
    """Words of a command line over a good table."""
    words = []
    for _ in range(int(draws.integers(1, 4))):
        key = one_of(draws, list(table))
        if isinstance(table[key], dict):
            key += "." + one_of(draws, list(table[key]))
        key = typo(draws, key) if draws.integers(3) == 0 else key
        words.append(f"{key}={hostile_value(draws)}" if draws.integers(10) else key)
    return table, words


def through_file(read: Callable[[Path], object], name: str) -> Callable[[bytes], object]:
    """A reader of bytes from one that reads a file."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))

    def reads(content: bytes) -> object:
        path = folder / name
        path.write_bytes(content)
        return read(path)

    return reads


def run_folder() -> Path:
    """A finished run of two clients' worth of everything that a run writes."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-run-")) / "run"
    execute_config(build_config({**SMALL, "method": "fedmerge", "finetune_epochs": 1}), folder=folder)
    return folder


def saved_targets(folder: Path) -> tuple[Target, ...]:
    """The files of a run folder."""
    content = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    rounds = content["rounds.jsonl"]
    return (
        Target("run.json", (content["run.json"],), changed_json, lambda b: run_from(b, "run.json"), 2),
        Target("checkpoint", (_checkpoint(),), changed_checkpoint, _read_checkpoint, 2),
        Target("results of a benchmark", (_result(),), changed_json, lambda b: result_from(b, "runs.jsonl"), 1),
        Target("rounds.jsonl", (rounds,), changed_lines, _read_rounds, 2),
        Target("serving.json", (content["serving.json"],), changed_json, _said(serving_from), 2),
        Target("partition.json", (content["partition.json"],), changed_json, _said(partition_from), 1),
        Target(
            "models.safetensors", (content["models.safetensors"], _small_tensors()), changed_tensors, read_tensors, 4
        ),
    )


def _result() -> bytes:
    """One line of a benchmark's store."""
    ticket = Ticket("key", "request", "setting", "fedavg", 0, "report")
    found = Result(
        **dataclasses.asdict(ticket), method="fedavg", options={"a": 1}, status="finished", message="", versions={},
        test=(0.5, None), num_test=(3, 4), state={"num_models": 1},
    )  # fmt: skip
    return to_line(found).encode()


def _checkpoint() -> bytes:
    """A checkpoint as a run writes it, of two small tensors."""
    tensors, digits = _small_tensors(), "0" * 64
    return packed(Manifest(3, digits, digits, digest(tensors), 100, digits, 2, digits, 1.5), tensors)


def changed_checkpoint(draws: Draws, content: bytes) -> bytes:
    """Changed anywhere; or its manifest or tensors changed and its digests made to fit, as a forger would."""
    if draws.integers(3) == 0:
        return changed_bytes(draws, content)
    start = len(MAGIC) + 8
    stop = start + int.from_bytes(content[len(MAGIC) : start], "little")
    manifest, tensors = content[start:stop], content[stop + 32 :]
    if draws.integers(2):
        tensors = changed_tensors(draws, tensors)
        manifest = json.dumps({**json.loads(manifest), "tensors": digest(tensors)}).encode()
    else:
        manifest = changed_json(draws, manifest)
    head = MAGIC + len(manifest).to_bytes(8, "little") + manifest
    return head + hashlib.sha256(head).digest() + tensors


def _read_checkpoint(content: bytes) -> object:
    return read_tensors(unpacked(content)[1])


def _read_rounds(content: bytes) -> object:
    return tuple(rounds_from(io.BytesIO(content), 5, "rounds.jsonl"))


def _said(read: Callable[[bytes], object]) -> Callable[[bytes], object]:
    """A reader whose ValueError its caller words, with the file's name."""

    def reads(content: bytes) -> object:
        try:
            return read(content)
        except ValueError as error:
            raise FedmergeError(str(error)) from error

    return reads


def _small_tensors() -> bytes:
    return save(
        {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([True]), "c": torch.empty(0, 4)}, {"round": "3"}
    )


def config_targets() -> tuple[Target, ...]:
    """Configurations, words of the command line, suites."""
    tables = config_tables()
    return (
        Target("configuration, table", tables, changed_table, build_config, 8, names_keys=True),
        Target(
            "configuration, TOML", tables, changed_toml, through_file(lambda p: build_config(read_toml(p)), "c.toml"), 5
        ),
        Target("configuration, words", tables, changed_words, lambda case: build_config(override(*case)), 3),
        Target("suite, TOML", (SUITE,), changed_toml, through_file(lambda p: read_suite(str(p)), "s.toml"), 1),
        Target("suite, table", (SUITE,), lambda draws, suite: changed_table(draws, suite)[0], suite_of, 1),
    )


def data_targets() -> tuple[Target, ...]:
    """A client's own files and the archives of package clients."""
    targets = [
        Target("client .npz", (_npz(), _npz(compressed=True)), changed_bytes, _file_reader(".npz"), 2),
        Target("client .csv", (b"a,b,label\n1,2,x\n3,4,y\n5.5,-1e3,x\n",), changed_bytes, _file_reader(".csv"), 2),
        Target(
            "client .csv of texts", (b"text,label\nan egg,x\nmilk,y\n",), changed_bytes, _file_reader(".csv", "text"), 1
        ),
        Target("wheel", (_zip(),), changed_bytes, through_file(lambda p: read_wheel_folder(p, ""), "x.whl"), 1),
        Target("tgz", (_tgz(),), changed_bytes, through_file(lambda p: read_tgz_folder(p, ""), "x.tgz"), 1),
        Target("deb", (_deb(),), changed_bytes, through_file(lambda p: read_deb_folder(p, ""), "x.deb"), 1),
    ]
    return tuple(targets)


def _file_reader(suffix: str, text: str | None = None) -> Callable[[bytes], object]:
    return through_file(lambda path: READERS[suffix](path, "label", text), f"client{suffix}")


def _npz(*, compressed: bool = False) -> bytes:
    stream = io.BytesIO()
    arrays: Any = {"x": np.arange(24.0).reshape(6, 4), "y": np.array([0, 1] * 3)}
    (np.savez_compressed if compressed else np.savez)(stream, **arrays)
    return stream.getvalue()


def _zip() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(3):
            archive.writestr(f"package/{number}.txt", "text " * 20)
    return stream.getvalue()


def _tgz() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for number in range(3):
            member = tarfile.TarInfo(f"package/{number}.txt")
            member.size = 100
            archive.addfile(member, io.BytesIO(b"x" * 100))
    return stream.getvalue()


def _deb() -> bytes:
    data = _tgz()
    header = b"data.tar.gz".ljust(48) + str(len(data)).encode().ljust(10) + b"`\n"
    return b"!<arch>\n" + header + data


def all_targets() -> tuple[Target, ...]:
    """Every reader."""
    return (*config_targets(), *saved_targets(run_folder()), *data_targets())


__all__ = ["Target", "all_targets"]
