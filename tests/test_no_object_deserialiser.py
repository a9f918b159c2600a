"""Nothing that the package reads can run code: no object deserialiser, no evaluation of texts, anywhere in it."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import fedmerge

PACKAGE = Path(fedmerge.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

MODULES = {
    "pickle", "_pickle", "cPickle", "pickletools", "marshal", "shelve", "dbm", "copyreg", "code", "codeop", "runpy",
    "dill", "cloudpickle", "joblib", "jsonpickle", "klepto", "yaml", "ruamel", "zodb", "h5py", "hickle", "imp",
    "zipimport",
}  # fmt: skip
"""Modules that make objects or code from bytes."""
BUILTINS = {"eval", "exec", "compile", "__import__", "execfile"}
ATTRIBUTES = {
    "read_pickle", "to_pickle", "read_hdf", "load_module", "exec_module", "find_module", "unsafe_load", "full_load",
    "allow_code_execution", "load_state_dict_from_url", "weights_only", "__reduce__", "__setstate__", "find_class",
    "add_safe_globals",
}  # fmt: skip
"""Functions and arguments of other modules that do."""
OWN_CODE = "models/imported.py"
"""The documented exception: the user's own network, which the user names, by import path."""
ALLOWED = {OWN_CODE: {"exec_module"}}
LOADERS = {("torch", "load"), ("torch", "save"), ("torch", "hub"), ("torch", "package"), ("jit", "load")}
OWN_PROCESSES = "runtime/parcels.py"
"""Reads what multiprocessing writes, from memory that only processes which this one started can write to."""
DYNAMIC = {"import_module", "spec_from_file_location", "module_from_spec"}
BY_NAME = {OWN_CODE, "__init__.py"}
"""Files that import modules by a name that does not stand there: the user's, and the package's own, see `_HOME_OF`."""


def faults(source: str, file: str = "x.py") -> list[str]:
    """What a file must not contain, each with its line."""
    return [f"{file}:{line}: {what}" for line, what in _found(ast.parse(source), file)]


def _found(tree: ast.AST, file: str) -> Iterator[tuple[int, str]]:
    allowed = ALLOWED.get(file, set()) | (DYNAMIC if file in BY_NAME else set())
    fixed = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call) and _is_of_one_package(node)}
    for node in ast.walk(tree):
        for name in _imported(node):
            parts = name.split(".")
            if parts[0] in MODULES or set(parts) & (ATTRIBUTES - allowed):
                yield getattr(node, "lineno", 0), f"import of {name}"
            if parts[0] in {"torch", "numpy"} and parts[-1] in {"load", "loads", "save", "hub", "package"}:
                yield getattr(node, "lineno", 0), f"import of {name}"
            if parts[-1] in DYNAMIC - allowed:
                yield getattr(node, "lineno", 0), f"import of {name}"
            if "reduction" in parts and file != OWN_PROCESSES:
                yield getattr(node, "lineno", 0), f"import of {name}"
        if isinstance(node, ast.Name) and node.id in BUILTINS:
            yield node.lineno, node.id
        if isinstance(node, ast.Attribute) and id(node) not in fixed:
            yield from _of_attribute(node, allowed)
        if isinstance(node, ast.Call):
            yield from _of_call(node)


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and not node.level:
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def _is_of_one_package(node: ast.Call) -> bool:
    """Whether a call imports from a package that stands there by name, or from the file's own."""
    if getattr(node.func, "attr", "") != "import_module" or not node.args:
        return False
    name = node.args[0]
    if isinstance(name, ast.JoinedStr):
        first = name.values[0]
        if isinstance(first, ast.FormattedValue):
            return getattr(first.value, "id", "") == "__name__"
        return "." in ast.unparse(first) and _is_harmless(first)
    return _is_harmless(name)


def _is_harmless(name: ast.expr) -> bool:
    return isinstance(name, ast.Constant) and str(name.value).split(".")[0] not in MODULES


def _of_attribute(node: ast.Attribute, allowed: set[str]) -> Iterator[tuple[int, str]]:
    owner = node.value.id if isinstance(node.value, ast.Name) else getattr(node.value, "attr", "")
    if (owner, node.attr) in LOADERS or owner in MODULES | {"builtins"} or node.attr in ATTRIBUTES - allowed:
        yield node.lineno, f"{owner}.{node.attr}"
    if node.attr in DYNAMIC - allowed:
        yield node.lineno, f"{owner}.{node.attr}"
    if node.attr in {"ForkingPickler", "Unpickler", "cloudpickle"}:
        yield node.lineno, f"{owner}.{node.attr}"
    if (owner, node.attr) in {("np", "fromregex"), ("np", "DataSource")}:
        yield node.lineno, f"{owner}.{node.attr}"


def _of_call(node: ast.Call) -> Iterator[tuple[int, str]]:
    given = {keyword.arg: keyword.value for keyword in node.keywords}
    name = getattr(node.func, "attr", getattr(node.func, "id", ""))
    value = getattr(node.func, "value", None)
    owner = getattr(value, "id", getattr(value, "attr", ""))
    if owner in {"np", "numpy"} and name in {"load", "lib"} and not _is(given.get("allow_pickle"), False):
        yield node.lineno, f"{owner}.{name} without allow_pickle=False"
    if "allow_pickle" in given and not _is(given["allow_pickle"], False):
        yield node.lineno, "allow_pickle"
    if "trust_remote_code" in given and not _is(given["trust_remote_code"], False):
        yield node.lineno, "trust_remote_code"
    if "use_safetensors" in given and not _is(given["use_safetensors"], True):
        yield node.lineno, "use_safetensors"
    if "shell" in given and not _is(given["shell"], False):
        yield node.lineno, "shell"
    if name == "from_pretrained":
        yield from _of_pretrained(node, owner, given)
    if name == "extractall" or (owner == "os" and name in {"system", "popen"}):
        yield node.lineno, name
    if name == "getattr" and len(node.args) > 1 and isinstance(node.args[1], ast.Constant):
        word = node.args[1].value
        if isinstance(word, str) and word in BUILTINS | ATTRIBUTES:
            yield node.lineno, f"getattr of {word}"


def _of_pretrained(node: ast.Call, owner: str, given: Mapping[str | None, ast.AST]) -> Iterator[tuple[int, str]]:
    """Without a word on it, transformers asks at the terminal whether code from the hub may run."""
    if "trust_remote_code" not in given:
        yield node.lineno, "from_pretrained without trust_remote_code=False"
    if not owner.endswith(("Config", "Tokenizer")) and "use_safetensors" not in given:
        yield node.lineno, "from_pretrained without use_safetensors=True"


def _is(node: ast.AST | None, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_file_of_the_package_can_turn_data_into_code(path: Path) -> None:
    assert faults(path.read_text(encoding="utf-8"), path.relative_to(PACKAGE).as_posix()) == []


def test_the_whole_package_is_looked_at() -> None:
    found = {path.relative_to(PACKAGE).as_posix() for path in FILES}
    assert {*BY_NAME, OWN_PROCESSES, "core/tensor_files.py", "experiment/record.py", "cli/__init__.py"} <= found


@pytest.mark.parametrize(
    "planted",
    [
        "import pickle",
        "import pickle as p",
        "import numpy, marshal",
        "from pickle import loads",
        "from shelve import open as o",
        "def f():\n    import dill",
        "import cloudpickle.pickle",
        "import joblib",
        "import yaml",
        "from ruamel.yaml import YAML",
        "eval('1')",
        "exec(text)",
        "compile(text, 'x', 'exec')",
        "__import__('os')",
        "run = eval",
        "import builtins\nbuiltins.exec(text)",
        "getattr(builtins, 'eval')(text)",
        "torch.load(path)",
        "torch.load(path, weights_only=True)",
        "from torch import load",
        "load = torch.load",
        "torch.jit.load(path)",
        "torch.hub.load('a/b', 'c')",
        "model(weights_only=False)\ntorch.serialization.add_safe_globals([x])",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=flag)",
        "from numpy import load",
        "numpy.load(path)",
        "reader(path, allow_pickle=True)",
        "pd.read_pickle(path)",
        "frame.to_pickle(path)",
        "from pandas import read_pickle",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "AutoConfig.from_pretrained(x)",
        "AutoModel.from_pretrained(x, trust_remote_code=False)",
        "AutoModel.from_pretrained(x, use_safetensors=False)",
        "import runpy",
        "from multiprocessing.reduction import ForkingPickler",
        "import multiprocessing.reduction",
        "from multiprocessing import reduction",
        "multiprocessing.reduction.ForkingPickler.loads(text)",
        "ray.cloudpickle.loads(text)",
        "import importlib\nimportlib.import_module(name)",
        "from importlib import import_module",
        "import importlib\nimportlib.import_module('pickle')",
        "import importlib\nimportlib.import_module(f'{name}.load')",
        "import importlib\nload = importlib.import_module",
        "from importlib.util import spec_from_file_location",
        "spec.loader.exec_module(module)",
        "subprocess.run(words, shell=True)",
        "os.system(words)",
        "archive.extractall(folder)",
    ],
)
def test_planted_code_is_found(planted: str) -> None:
    assert faults(planted)


@pytest.mark.parametrize(
    "sound",
    [
        "import json, tomllib",
        "re.compile('a')",
        "model.eval()",
        "np.load(path, allow_pickle=False)",
        "from safetensors.torch import load, load_file",
        "AutoModel.from_pretrained(x, use_safetensors=True, trust_remote_code=False)",
        "import importlib.util\nimportlib.util.find_spec('onnx')",
        "importlib.import_module(f'{__name__}.{part}')",
        "importlib.import_module(f'opacus.{part}')",
        "importlib.import_module('onnx')",
        "getattr(options, 'name')",
    ],
)
def test_sound_code_is_left_alone(sound: str) -> None:
    assert faults(sound) == []
