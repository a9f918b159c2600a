"""The ServerApp says why it does not run, in a way that Flower passes on."""

from __future__ import annotations

import pytest

pytest.importorskip("flwr")

from flower_stub import HereGrid
from flwr.app import Context, RecordDict
from small_deployment import write_federation

from fedmerge.core.errors import FedmergeError, UsageError
from fedmerge.deploy.flower.server_app import main
from fedmerge.experiment.lock import run_lock


def context_of(folder):
    return Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={"folder": str(folder)})


def test_what_stops_a_run_is_an_exception_and_a_line_of_the_log(tmp_path, caplog):
    grid = HereGrid(answer=lambda message, context: message, configs={})
    with pytest.raises(UsageError, match="nowhere"):
        main(grid, context_of(tmp_path / "nowhere"))
    federation = write_federation(tmp_path / "f")
    federation.run_folder.mkdir()
    with run_lock(federation.run_folder), pytest.raises(FedmergeError, match="in use by process") as caught:
        main(grid, context_of(federation.folder))
    assert caplog.records[-1].getMessage() == str(caught.value)
    assert caplog.records[-1].levelname == "ERROR"
    assert caplog.records[-1].exc_info is None
