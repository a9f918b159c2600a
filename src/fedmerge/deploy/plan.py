"""What stays the same during a deployed run, made from the federation's folder without any site."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace

from fedmerge.core.errors import UsageError
from fedmerge.core.keeping import travelling
from fedmerge.deploy.federation import FederationConfig
from fedmerge.deploy.outbox import Templates
from fedmerge.deploy.protection import privacy_faults
from fedmerge.experiment.choice import Choice
from fedmerge.experiment.elsewhere import setup_without_examples, start_of
from fedmerge.experiment.privacy_check import privacy_of
from fedmerge.experiment.simulation import Progress, Setup


@dataclass(frozen=True)
class Plan:
    """All that stays the same during a run.

    Attributes:
        federation: Its folder, read.
        setup: Method, network and options.
        templates: Of updates.
        start: Before the first round.
        digest: Of who takes part with which form of data.
    """

    federation: FederationConfig
    setup: Setup
    templates: Templates
    start: Progress
    digest: str


def plan_of(federation: FederationConfig) -> Plan:
    """Network, method and first state of a federation, without any site.

    Raises:
        UsageError: if the method and the network do not fit each other, or a private run's conditions do not hold.
    """
    terms = federation.terms
    faults = privacy_faults(terms)
    if faults:
        raise UsageError("\n".join(faults))
    schema, options = terms.schema, terms.options
    data = replace(
        schema.without_examples(federation.names),
        source=f"{federation.deploy.name}, {len(federation.names)} sites",
    )
    choice = Choice("sequential", why="every site computes for itself")
    setup = setup_without_examples(terms.method, terms.model, terms.training, options, data, choice)
    travels = travelling(setup.layout, options.keep)
    setup = replace(setup, privacy=privacy_of(terms.method, setup.played, travels, options, len(data.clients)))
    identity = json.dumps([federation.names, terms.plain()["data"]], sort_keys=True)
    digest = hashlib.sha256(identity.encode()).hexdigest()
    return Plan(federation, setup, Templates(setup, schema), start_of(setup, terms.model), digest)
