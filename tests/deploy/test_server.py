"""The server's round loop over a network: the bits of the run in one process, whatever happens on the way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_deployment import HereLink, SlowClock, in_process, write_federation

from fedmerge.core.tensor_files import read_tensors
from fedmerge.deploy.server import serve
from fedmerge.experiment.record import read_run


def server_tensors(folder: Path, name: str = "models.safetensors") -> dict[str, torch.Tensor]:
    found = read_tensors(folder / name)
    return {key: value for key, value in found.items() if key.startswith("server.")}


def test_the_deployed_run_has_the_bits_of_the_run_in_one_process(tmp_path: Path) -> None:
    federation = write_federation(tmp_path / "f")
    serve(federation, HereLink(federation), clock=SlowClock().clock())
    here = in_process(federation, tmp_path / "here")
    there = read_run(federation.run_folder)
    for file in ("models.safetensors", "last.safetensors"):
        wanted, got = server_tensors(tmp_path / "here", file), server_tensors(federation.run_folder, file)
        assert wanted.keys() == got.keys()
        assert all(torch.equal(wanted[key], got[key]) for key in wanted)
    assert [line.test for line in there.rounds] == [line.test for line in here.record.rounds]
    assert [line.mixing for line in there.rounds] == [line.mixing for line in here.record.rounds]
    assert [line.bytes_up for line in there.rounds] == [line.bytes_up for line in here.record.rounds]
    assert there.status == "finished"
