"""The ServerApp of a federation: reads its folder and runs it over Flower's Grid."""

from __future__ import annotations

import logging

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedmerge.core.errors import FedmergeError
from fedmerge.deploy.federation import FederationConfig, read_federation
from fedmerge.deploy.flower.grid_link import GridLink
from fedmerge.deploy.identity import public_key_bytes
from fedmerge.deploy.server import serve

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Runs the federation whose folder the run configuration names.

    Raises:
        FedmergeError: why it does not. Flower takes an exception for the end of a run at once, and sends the log first;
            of a process that only exits (SystemExit) it learns after a minute, and what was logged is lost.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    folder = str(context.run_config.get("folder", ""))
    try:
        federation = read_federation(folder)
        serve(federation, GridLink(grid, keys_of(federation)))
    except FedmergeError as error:
        logging.getLogger(__name__).error("%s", error)  # noqa: TRY400 - one line of its own, for `fedmerge deploy run`
        raise


def keys_of(federation: FederationConfig) -> dict[bytes, str]:
    """Each site by its registered public key; nothing for a federation without keys."""
    return {public_key_bytes(key): name for name, key in federation.sites.items() if key}
