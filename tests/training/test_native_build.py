"""Kernels are built once, whole or not at all; without them torch computes and the reason is told."""

from __future__ import annotations

import multiprocessing
import os
import stat
from pathlib import Path

import pytest
import torch
from torch import nn

from fedmerge.training import native
from fedmerge.training.native import build, functions

needs_compiler = pytest.mark.skipif(native.available() is not None, reason=f"no kernels: {native.available()}")


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch):
    """Forgets what was found out about this machine, before and after."""
    caches = (functions._kernels, functions.available, functions._width)
    for cache in caches:
        cache.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A source that compiles in no time."""
    monkeypatch.setattr(build, "SOURCE", tmp_path / "small.c")
    build.SOURCE.write_text("long fm_lanes(void) { return 4; }")


def _built(folder: Path) -> Path:
    (made,) = [path for path in folder.iterdir() if not path.name.startswith("building-")]
    return made


def test_without_a_compiler_the_reason_is_told_and_torch_computes(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fresh.setenv("PATH", str(tmp_path))
    fresh.delenv("CC", raising=False)
    assert native.available() == "no C compiler found (cc, gcc, clang); install one, or name it in CC"
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8))
    assert native.accelerated(module) is module
    x = torch.ones(16, 3, 8, 8)
    weight, bias = module[0].weight, module[0].bias
    assert torch.equal(native.conv2d(x, weight, bias), nn.functional.conv2d(x, weight, bias))


def test_they_can_be_switched_off(fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv("FEDMERGE_NATIVE", "0")
    assert native.available() == "switched off by FEDMERGE_NATIVE=0"


def test_a_compiler_that_is_not_there_is_named(fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv("CC", "no-such-compiler")
    assert native.available() == "no C compiler found (no-such-compiler); install one, or name it in CC"


def test_a_compiler_that_fails_is_quoted(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho out of order >&2\nexit 3\n")
    broken.chmod(0o700)
    fresh.setenv("CC", str(broken))
    assert native.available() == f"{broken} failed with code 3: out of order"


@needs_compiler
def test_source_that_does_not_compile_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.c"
    wrong.write_text("int f( {")
    monkeypatch.setattr(build, "SOURCE", wrong)
    with pytest.raises(native.NoKernelsError, match="failed with code 1"):
        build.library(tmp_path / "kept")
    assert list((tmp_path / "kept").iterdir()) == []


@needs_compiler
def test_a_cache_that_cannot_be_written_is_a_reason(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(native.NoKernelsError, match=r"cannot keep or load kernels in .*: Not a directory"):
        build.library(tmp_path / "file" / "native")


@needs_compiler
@pytest.mark.usefixtures("small")
def test_a_build_is_made_once_and_is_nobody_elses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "native"
    build.library(folder)
    made = _built(folder)
    before = (made / "kernels.so").stat().st_mtime_ns
    build.library(folder)
    assert (made / "kernels.so").stat().st_mtime_ns == before
    rights = [stat.S_IMODE(path.stat().st_mode) for path in (folder, made, made / "kernels.so")]
    assert rights == [0o700] * 3
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-DOTHER"))
    build.library(folder)
    assert len(list(folder.iterdir())) == 2


@needs_compiler
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "no digest", "no library"])
def test_a_damaged_build_is_made_anew(damage: str, tmp_path: Path) -> None:
    folder = tmp_path / "native"
    source_key = _key_of_a_build(folder)
    made = folder / source_key
    sound = (made / "kernels.so").read_bytes()
    match damage:
        case "cut":
            _put(made / "kernels.so", sound[: len(sound) // 2])
        case "changed":
            _put(made / "kernels.so", sound[:-1] + bytes([sound[-1] ^ 1]))
        case "empty":
            _put(made / "kernels.so", b"")
        case "no digest":
            (made / "kernels.sha256").unlink()
        case "no library":
            (made / "kernels.so").unlink()
    assert not build._is_whole(made)
    assert build.library(folder).fm_lanes() == 4
    assert build._is_whole(made)
    assert [path.name for path in folder.iterdir()] == [source_key]


def _key_of_a_build(folder: Path) -> str:
    """A build that this process has not loaded: a loaded file must not be written over."""
    compiler = build._compiler()
    key = build._key(compiler, build.SOURCE.read_bytes())
    build._make(folder / key, compiler)
    return key


def _put(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)
    path.chmod(0o700)


@needs_compiler
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("which", ["folder", "build", "library"])
def test_what_others_could_have_written_is_not_loaded(which: str, tmp_path: Path) -> None:
    folder = tmp_path / "native"
    made = folder / _key_of_a_build(folder)
    open_to_all = {"folder": folder, "build": made, "library": made / "kernels.so"}[which]
    open_to_all.chmod(0o777)
    with pytest.raises(native.NoKernelsError, match="can be written by them"):
        build.library(folder)


def _build_at_once(folder: str, start: multiprocessing.synchronize.Barrier, results: multiprocessing.Queue) -> None:
    start.wait()
    results.put(build.library(Path(folder)).fm_lanes())


@needs_compiler
@pytest.mark.slow
def test_builds_at_the_same_time_end_in_one(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(3), context.Queue()
    folder = tmp_path / "native"
    workers = [context.Process(target=_build_at_once, args=(str(folder), start, results)) for _ in range(3)]
    for worker in workers:
        worker.start()
    found = {results.get(timeout=120) for _ in workers}
    for worker in workers:
        worker.join()
    assert found == {functions._width()}
    assert len(list(folder.iterdir())) == 1
    assert build._is_whole(_built(folder))


@needs_compiler
def test_the_name_of_a_build_depends_on_source_and_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = build._compiler()
    names = {build._key(compiler, b"a"), build._key(compiler, b"b")}
    monkeypatch.setattr(build, "FLAGS", ("-O1", *build.FLAGS[1:]))
    names.add(build._key(compiler, b"a"))
    assert len(names) == 3


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("target", ["-march=x86-64", "-march=x86-64-v3"])
def test_the_source_needs_no_wide_vectors(target: str, fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if os.uname().machine != "x86_64":
        pytest.skip("flags are for x86-64")
    fresh.setattr(build, "FLAGS", ("-O3", target, *build.FLAGS[2:]))
    fresh.setenv("FEDMERGE_CACHE", str(tmp_path))
    assert native.available() is None
    assert functions._width() < 16
    x = torch.sin(torch.arange(16 * 9 * 6 * 5.0)).view(16, 9, 6, 5)
    module = nn.Sequential(nn.Conv2d(9, 12, 3, padding=1), nn.GroupNorm(3, 12), nn.ReLU(), nn.MaxPool2d(2))
    ours = native.accelerated(module)
    module(x).square().sum().backward()
    ours(x).square().sum().backward()
    for got, want in zip(ours.parameters(), module.parameters(), strict=True):
        assert torch.allclose(got.grad, want.grad, rtol=1e-3, atol=1e-3)
