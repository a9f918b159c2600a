"""Small faults put into a module one at a time: do the tests notice each of them?

    python benchmarks/faults/mutants.py [--sample N] [--seed S] [--lines L,...] [--seconds S] MODULE TESTS... > left.txt

Works in a copy of the tree that it makes for itself. A mutant differs from the module in one place:

- a comparison (``<`` and ``<=``, ``==`` and ``!=``, ``in`` and ``not in`` ...), ``and``/``or``, an arithmetic operator
  or a ``not`` is another one or gone;
- a number is one larger, a truth value the other one, a text has letters before it;
- an argument of a call is None, or, if it is the last or has a name, left out;
- what is assigned is None;
- a statement that only calls something, or that raises, does nothing; ``continue`` is ``break``.

Left alone are annotations, decorators, docstrings, type aliases, format specifications and lines with ``os.kill``: one
of their mutants sends a signal. Each mutant meets the tests in a process of its own, ended at the first failure, with a
limit of time and of memory. Failing tests, no memory and no end count as killed; ends by the clock are told apart.
Hypothesis draws from one seed and does not shrink.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import importlib
import importlib.abc
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).parents[2]
_COPIED = ("src", "tests", "benchmarks/faults", "pyproject.toml")
_MEMORY = 8_000_000 * 1024
_LOADED_ONCE = ("torch", "numpy", "scipy.stats", "pytest", "hypothesis", "beartype", "jaxtyping", "safetensors.torch")
_OPTIONS = (
    "-q",
    "-x",
    "-p",
    "no:cacheprovider",
    "--hypothesis-seed=0",
    "-W",
    "ignore::pytest.PytestAssertRewriteWarning",
)
_OTHER: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.Pow: ast.Mult,
    ast.LShift: ast.RShift,
    ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitOr,
    ast.USub: ast.UAdd,
}


class Mutant(NamedTuple):
    """A module with one small fault.

    Attributes:
        line: Number of the line in the module, from 1.
        what: The fault, in words.
        source: The whole module.
    """

    line: int
    what: str
    source: str


class _Place(NamedTuple):
    """A node of the tree with the way to it: fields and places from the top."""

    node: ast.AST
    way: tuple[tuple[str, int | None], ...]


def mutants_of(source: str) -> list[Mutant]:
    """All mutants of a module that differ from it and from each other, in the order of the lines."""
    tree = ast.parse(source)
    seen, lines, found = {ast.unparse(tree)}, source.splitlines(), []
    for place in _places(tree, ()):
        line = getattr(place.node, "lineno", None)
        if line is None or "os.kill" in lines[line - 1]:
            continue
        for node in _changed(place.node):
            text = ast.unparse(_with(tree, place.way, node))
            if text not in seen and _compiles(text):
                seen.add(text)
                found.append(Mutant(line, f"{_short(place.node)}  ->  {_short(node)}", text))
    return sorted(found, key=lambda mutant: mutant.line)


def _places(node: ast.AST, way: tuple[tuple[str, int | None], ...]) -> Iterator[_Place]:
    """Every place below a node where a fault may be put."""
    yield _Place(node, way)
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "format_spec", "decorator_list"):
            continue
        for i, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(child, ast.AST) and not _is_left_alone(node, child):
                yield from _places(child, (*way, (field, i)))


def _is_left_alone(parent: ast.AST, child: ast.AST) -> bool:
    """Whether it is a docstring, an import, a type alias or a piece of a formatted text, whose whole is changed."""
    if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
        return True
    if isinstance(parent, ast.JoinedStr) and isinstance(child, ast.Constant):
        return True
    alias = isinstance(parent, ast.Module) and isinstance(child, ast.Assign) and isinstance(child.value, ast.Subscript)
    return alias or isinstance(child, ast.Import | ast.ImportFrom)


def _with(tree: ast.Module, way: Sequence[tuple[str, int | None]], node: ast.AST) -> ast.Module:
    """A copy of the tree with another node at the end of the way."""
    fresh = copy.deepcopy(tree)
    at: ast.AST = fresh
    for field, i in way[:-1]:
        at = getattr(at, field) if i is None else getattr(at, field)[i]
    field, i = way[-1]
    if i is None:
        setattr(at, field, node)
    else:
        getattr(at, field)[i] = node
    return ast.fix_missing_locations(fresh)


def _changed(node: ast.AST) -> Iterator[ast.AST]:
    """What a node may become."""
    if isinstance(node, ast.Compare):
        for i, operator in enumerate(node.ops):
            if type(operator) in _OTHER:
                yield _replaced(node, ops=[*node.ops[:i], _OTHER[type(operator)](), *node.ops[i + 1 :]])
    elif isinstance(node, ast.BoolOp | ast.BinOp | ast.AugAssign) and type(node.op) in _OTHER:
        yield _replaced(node, op=_OTHER[type(node.op)]())
    elif isinstance(node, ast.UnaryOp):
        yield node.operand if isinstance(node.op, ast.Not) else _replaced(node, op=ast.UAdd())
    elif isinstance(node, ast.Constant):
        yield from _changed_constant(node)
    elif isinstance(node, ast.JoinedStr):
        yield _replaced(node, values=[ast.Constant("XX"), *node.values])
    elif isinstance(node, ast.Call):
        yield from _changed_call(node)
    elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
        yield _replaced(node, value=ast.Constant(None))
    elif isinstance(node, ast.Raise) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
        yield ast.Pass()
    elif isinstance(node, ast.Continue | ast.Break):
        yield ast.Break() if isinstance(node, ast.Continue) else ast.Continue()


def _changed_constant(node: ast.Constant) -> Iterator[ast.AST]:
    value = node.value
    if isinstance(value, bool):
        yield ast.Constant(not value)
    elif isinstance(value, int | float):
        yield ast.Constant(value + 1)
    elif isinstance(value, str):
        yield ast.Constant("XX" + value)
    elif isinstance(value, bytes):
        yield ast.Constant(b"XX" + value)


def _changed_call(node: ast.Call) -> Iterator[ast.AST]:
    for i, argument in enumerate(node.args):
        before, after = node.args[:i], node.args[i + 1 :]
        if not isinstance(argument, ast.Starred):
            yield _replaced(node, args=[*before, ast.Constant(None), *after])
        if not after:
            yield _replaced(node, args=before)
    for i, keyword in enumerate(node.keywords):
        start, end = node.keywords[:i], node.keywords[i + 1 :]
        yield _replaced(node, keywords=[*start, ast.keyword(keyword.arg, ast.Constant(None)), *end])
        yield _replaced(node, keywords=[*start, *end])


def _replaced(node: ast.AST, **fields: object) -> ast.AST:
    fresh = copy.copy(node)
    for name, value in fields.items():
        setattr(fresh, name, value)
    return fresh


def _compiles(text: str) -> bool:
    try:
        compile(text, "mutant", "exec")
    except SyntaxError:
        return False
    return True


def _short(node: ast.AST) -> str:
    text = " ".join(ast.unparse(ast.fix_missing_locations(copy.deepcopy(node))).split())
    return text if len(text) <= 100 else text[:97] + "..."


# ---------------------------------------------------------------- running


class _Without(importlib.abc.MetaPathFinder):
    """While it is there, a module cannot be imported."""

    def __init__(self, name: str) -> None:
        self._name = name

    def find_spec(self, fullname: str, *_: object) -> None:
        """Raises for the module, and leaves every other one to the finders after it."""
        if fullname == self._name:
            raise ImportError(fullname)


def load_all_but(tree: Path, module: str) -> None:
    """Imports what does not need the module, once for all mutants, with the type checks that the tests turn on."""
    sys.path[:0] = [str(tree / "src"), str(tree / "tests")]
    importlib.import_module("conftest")
    finder = _Without(_name_of(Path(module)))
    sys.meta_path.insert(0, finder)  # before the finder that turns the checks on
    for path in sorted(p for p in (tree / "src").rglob("*.py") if p.stem != "__main__"):
        with contextlib.suppress(Exception):  # it is loaded with the tests, if they need it
            importlib.import_module(_name_of(path.relative_to(tree)))
    sys.meta_path.remove(finder)
    if _name_of(Path(module)) in sys.modules:
        raise SystemExit(f"{module} was loaded too early")


def _name_of(path: Path) -> str:
    """The dotted name of a file below ``src``."""
    return ".".join(path.with_suffix("").parts[1:]).removesuffix(".__init__")


def outcome(tree: Path, tests: Sequence[str], seconds: float) -> str:
    """Runs tests in a process of their own: ``survived``, ``killed``, ``clock``, or ``broken`` if none could run.

    Args:
        tree: Copy of the repository.
        tests: Files or names of tests in it, in the order of running.
        seconds: Until it is ended.
    """
    process = os.fork()
    if process == 0:
        _run_tests(tree, tests)
    end = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return {0: "survived", 5: "broken", 4: "broken"}.get(code, "killed")
        if time.monotonic() > end:
            os.killpg(process, signal.SIGKILL)
            os.waitpid(process, 0)
            return "clock"
        time.sleep(0.01)


def _run_tests(tree: Path, tests: Sequence[str]) -> None:
    """In the child: never returns."""
    code = 3
    try:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
        os.chdir(tree)
        os.environ["PYTHONPATH"] = str(tree / "src")
        with (tree / "output.txt").open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            options = [*_OPTIONS, f"--basetemp={tree / 'temp'}"]
            code = importlib.import_module("pytest").main([*options, *tests])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(int(code))


def main() -> None:
    """Prints a row of the table, and below it the survivors."""
    parser = argparse.ArgumentParser()
    parser.add_argument("module", help="under the root of the repository")
    parser.add_argument("tests", nargs="+")
    parser.add_argument("--sample", type=int, help="how many mutants, drawn at random; all if left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lines", type=lambda text: {int(line) for line in text.split(",")}, help="no others")
    parser.add_argument("--seconds", type=float, default=90, help="after which a run of the tests is ended")
    asked = parser.parse_args()
    mutants = mutants_of((ROOT / asked.module).read_text(encoding="utf-8"))
    if asked.lines:
        mutants = [mutant for mutant in mutants if mutant.line in asked.lines]
    number = len(mutants) if asked.sample is None else min(asked.sample, len(mutants))
    drawn = sorted(np.random.default_rng(asked.seed).choice(len(mutants), number, replace=False))
    _load_libraries()
    with tempfile.TemporaryDirectory() as folder:
        meet = partial(outcome, Path(folder).resolve(), asked.tests, asked.seconds)
        tally, left = _tried(Path(folder).resolve(), asked.module, [mutants[k] for k in drawn], meet)
    killed = tally["killed"] + tally["clock"]
    how = "all" if number == len(mutants) else f"seed {asked.seed}"
    row = (asked.module, len(mutants), number, killed, tally["clock"], tally["survived"], f"{killed / number:.1%}", how)
    print("| module | mutants | run | killed | of these by the clock | survived | score | drawn |")
    print("|---|--:|--:|--:|--:|--:|--:|---|")
    print(f"| {' | '.join(map(str, row))} |\n")
    print("\n".join(f"{mutant.line}: {mutant.what}" for mutant in left))


def _load_libraries() -> None:
    """What every run of the tests needs and no mutant changes."""
    os.environ["OMP_NUM_THREADS"] = "1"
    for name in _LOADED_ONCE:
        importlib.import_module(name)
    importlib.import_module("torch").set_num_threads(1)
    hypothesis = importlib.import_module("hypothesis")
    phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]
    hypothesis.settings.register_profile("mutants", database=None, phases=phases)
    hypothesis.settings.load_profile("mutants")


Tried = tuple[Counter[str], list[Mutant]]


def _tried(tree: Path, module: str, mutants: Sequence[Mutant], meet: Callable[[], str]) -> Tried:
    """How often each outcome came, and the survivors."""
    for part in _COPIED:
        (tree / part).parent.mkdir(parents=True, exist_ok=True)
        copied = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copied(ROOT / part, tree / part)
    path = tree / module
    path.write_text(ast.unparse(ast.parse(path.read_text(encoding="utf-8"))), encoding="utf-8")
    load_all_but(tree, module)
    if meet() != "survived":
        raise SystemExit("the tests fail without a mutant:\n" + (tree / "output.txt").read_text())
    sys.dont_write_bytecode, os.environ["PYTHONDONTWRITEBYTECODE"] = True, "1"
    for stale in path.parent.glob(f"__pycache__/{path.stem}.*"):
        stale.unlink()  # of the rest it is kept
    tally, left = Counter[str](), []
    for number, mutant in enumerate(mutants):
        path.write_text(mutant.source, encoding="utf-8")
        began, found = time.monotonic(), meet()
        tally["killed" if found == "broken" else found] += 1
        left += [mutant] if found == "survived" else []
        seconds = time.monotonic() - began
        line = f"{number + 1}/{len(mutants)} {found} {seconds:.0f} s, {mutant.line}: {mutant.what}"
        print(line, file=sys.stderr, flush=True)
    return tally, left


if __name__ == "__main__":
    main()
