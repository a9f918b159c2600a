"""What a site can find out before the first round: its keys, its server, its data, and whether it can train."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from fedmerge.core.errors import FedmergeError, UsageError, unknown_name
from fedmerge.core.protocol import tree_bytes
from fedmerge.deploy import identity
from fedmerge.deploy.client import answer_to
from fedmerge.deploy.federation import FILE, FederationConfig, read_federation
from fedmerge.deploy.messages import Order, answer_from
from fedmerge.deploy.outbox import Outbox, lettered
from fedmerge.deploy.plan import plan_of
from fedmerge.deploy.reach import Finding, check_server
from fedmerge.deploy.site import SiteConfig, read_site
from fedmerge.deploy.site_data import check_site_data
from fedmerge.deploy.telling import told_versions
from fedmerge.deploy.trees import form_of
from fedmerge.experiment.federation import encoder_of
from fedmerge.training import rate_of_round


def check_site(folder: Path | str, *, network: bool = True) -> list[Finding]:
    """Answers all questions about a site that can be answered at the site; no fault is raised.

    Args:
        folder: Of the site, with ``site.toml`` and what else the server made for it.
        network: Whether to ask the server too.
    """
    try:
        site = read_site(folder)
        found = [Finding("site.toml", True, f"site {site.name!r}")]
    except UsageError as error:
        return [Finding("site.toml", False, str(error))]
    authority = site.folder / identity.CA
    found += check_server(site.server, authority if authority.exists() else None) if network else []
    try:
        federation = read_federation(site.folder)
    except UsageError as error:
        return [*found, Finding(FILE, False, str(error))]
    terms = federation.terms
    found.append(Finding(FILE, True, f"terms {terms.digest[:12]}: {terms.options.rounds} rounds"))
    found += [_key(site, federation), _versions()]
    found += check_site_data(site, terms.schema, terms.options.seed, encoder_of(terms.model))
    return [*found, _step(site, federation)] if found[-1].ok else found


def _key(site: SiteConfig, federation: FederationConfig) -> Finding:
    """Whether the site's key is the one that the federation knows."""
    registered = federation.sites.get(site.name)
    if registered is None:
        return Finding("key", False, unknown_name("site", site.name, federation.sites))
    if federation.deploy.insecure:
        return Finding("key", True, "none is needed: the federation is insecure")
    try:
        own = identity.line_of_key_file(site.folder / identity.NODE_KEY)
    except FedmergeError as error:
        return Finding("key", False, str(error))
    if identity.public_key_bytes(own) != identity.public_key_bytes(registered):
        return Finding(
            "key",
            False,
            f"{identity.NODE_KEY} is {identity.fingerprint(own)}; registered for {site.name!r} is "
            f"{identity.fingerprint(registered)}. Send the server node.pub, or bring the right key",
        )
    return Finding("key", True, f"{identity.fingerprint(own)}, as registered")


def _versions() -> Finding:
    return Finding("versions", True, ", ".join(f"{name} {found}" for name, found in told_versions().items()))


def _step(site: SiteConfig, federation: FederationConfig) -> Finding:
    """Whether the site can do a round: it does the first one, on its own examples, and forgets it."""
    if federation.terms.schema.needs_moments:
        return Finding(
            "round", True, "not tried: the scale of the inputs is found from all sites' sums in the first one"
        )
    try:
        plan = plan_of(federation)
        client = federation.names.index(site.name)
        tree = Outbox(plan.setup, plan.start.state, [client]).of(client)
        order = Order(
            "round",
            "check",
            1,
            client,
            site.name,
            federation.terms.plain(),
            train=True,
            evaluate=True,
            rate=rate_of_round(federation.terms.training, 1, federation.terms.options.rounds),
            form=tuple(form_of(tree)),
        )
        with tempfile.TemporaryDirectory() as folder:
            answer = answer_to(lettered(order, tree), replace(site, state=folder))
    except (FedmergeError, ValueError) as error:
        return Finding("round", False, f"a round cannot be done: {error}")
    done = answer_from(answer.text)
    sent = tree_bytes(dict(answer.tensors))
    detail = f"one round on {done.num_train} examples took {done.seconds:.1f} s and sends {sent:,} bytes"
    return Finding("round", True, detail)
