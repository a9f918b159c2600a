"""What a deployed run has beside an ordinary one: its identity for the sites, and who has got a model.

Written as ``deployment.json`` into the run folder.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from fedmerge.core.errors import FedmergeError, UsageError, together
from fedmerge.core.files import write_atomically
from fedmerge.core.options import build_options
from fedmerge.core.strict_json import parse_json_table, read_bounded
from fedmerge.deploy.federation import FederationConfig

FILE = "deployment.json"


@dataclass(frozen=True)
class Deployment:
    """A deployed run.

    Attributes:
        run: Its identity: sites keep their private state under it.
        terms: Digest of what server and sites agreed on.
        delivered: Sites that have got their model of the selected round.
        mean: Subtracted from every site's inputs, where it was found from the sums of all sites; empty otherwise.
        std: Divided by, alike.
        stopped: Why the run stopped, if running it again at once would not help; empty otherwise.
        mend: Whether it would not help later either, before somebody has changed something.
    """

    run: str
    terms: str
    delivered: tuple[str, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    stopped: str = ""
    mend: bool = False


def new_deployment(terms: str) -> Deployment:
    """A run that has just been made; its identity is random, so that no site takes it for an earlier one."""
    return Deployment(secrets.token_hex(16), terms)


def write_deployment(folder: Path, deployment: Deployment) -> None:
    """Writes it down; on the disk when this returns."""
    write_atomically(folder / FILE, json.dumps(asdict(deployment), indent=1) + "\n", private=True)


def read_deployment(folder: Path) -> Deployment | None:
    """What `write_deployment` wrote; None if the folder has none.

    Raises:
        FedmergeError: if the file is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    faults: list[str] = []
    try:
        found = build_options(Deployment, parse_json_table(read_bounded(path)), FILE, faults)
    except ValueError as error:
        raise FedmergeError(f"{path} is damaged: {error}; the run cannot go on, make it again") from error
    if found is None:
        raise FedmergeError(f"{path} is damaged: {together(faults)}; the run cannot go on, make it again")
    return found


def refuse_other_terms(deployment: Deployment, federation: FederationConfig) -> None:
    """Refuses to go on with a run of other terms.

    Raises:
        UsageError: saying what to do.
    """
    if deployment.terms != federation.terms.digest:
        raise UsageError(
            f"{federation.run_folder} was run under other terms (method, network, training, options or form of the "
            "data); put the old federation.toml back, or move the folder away for a new run"
        )


def scaled(federation: FederationConfig, deployment: Deployment) -> FederationConfig:
    """The federation with the scale of inputs that its run found, where that was left open."""
    terms = federation.terms
    if not terms.schema.needs_moments or not deployment.mean:
        return federation
    return replace(federation, terms=replace(terms, schema=terms.schema.with_scale(deployment.mean, deployment.std)))
