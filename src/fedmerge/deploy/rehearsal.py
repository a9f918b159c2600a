"""A federation whose sites' folders are all on this machine, run in one process: the same numbers, in seconds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fedmerge.core.errors import UsageError
from fedmerge.data import FederatedData
from fedmerge.deploy.federation import FederationConfig
from fedmerge.deploy.moments import moments, pooled
from fedmerge.deploy.site import read_site
from fedmerge.deploy.site_data import raw_client, site_client
from fedmerge.experiment.execute import Outcome, Watcher, execute
from fedmerge.experiment.federation import encoder_of


def rehearse(federation: FederationConfig, folder: Path | None = None, *, watch: Watcher | None = None) -> Outcome:
    """Runs a federation without any network: its server's state, round by round, is that of the deployed run.

    Args:
        federation: Its folder, read; the sites' folders are in ``sites/``.
        folder: Where to write the run; created, must be empty.
        watch: Called after every round.

    Raises:
        UsageError: if a site's folder is not there or wrong.
        DataError: naming the file and row of a site's data that are wrong.
    """
    terms = federation.terms
    options = replace(terms.options, runtime="sequential", kernels="torch")
    data = gathered(federation)
    return execute(
        terms.method,
        data,
        terms.model,
        terms.training,
        options,
        label=federation.deploy.name,
        folder=folder,
        watch=watch,
    )


def gathered(federation: FederationConfig) -> FederatedData:
    """The examples of all sites, as each would load them itself."""
    if federation.living != federation.names:
        raise UsageError("a federation that has forgotten a site cannot be rehearsed: that site's examples are gone")
    terms = federation.terms
    seed, schema, encoder = terms.options.seed, terms.schema, encoder_of(terms.model)
    sites = [read_site(federation.folder / "sites" / name) for name in federation.names]
    if schema.needs_moments:
        raw = [raw_client(site, schema, seed=seed, encoder=encoder) for site in sites]
        schema = schema.with_scale(*pooled([moments(client) for client in raw]))
    clients = [site_client(site, schema, seed=seed, encoder=encoder) for site in sites]
    return replace(schema.without_examples(federation.names), clients=tuple(clients))
