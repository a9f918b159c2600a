"""A site that is ready to work: its examples, the network, the method and what runs it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fedmerge.core.memory import keep_freed
from fedmerge.core.protocol import Algorithm
from fedmerge.core.vector import Layout, layout_of
from fedmerge.data import ClientData, FederatedData
from fedmerge.deploy.federation import Terms
from fedmerge.deploy.site import SiteConfig
from fedmerge.deploy.site_data import site_client
from fedmerge.experiment.choice import objective_of
from fedmerge.experiment.federation import channels_last, encoder_of, in_precision, make_module
from fedmerge.experiment.simulation import played_method, remember
from fedmerge.experiment.trial import check_module
from fedmerge.runtime import Engine, Fleet, Sequential, first_fleet
from fedmerge.runtime.place import Place, device_of
from fedmerge.training import LocalTraining


@dataclass(frozen=True)
class Site:
    """A site that is ready to work.

    Attributes:
        config: Its own.
        terms: What was agreed on.
        data: Its examples, as a federation of one client, in the run's precision.
        module: The network, with the weights of draw 0.
        layout: Of the module.
        played: The method as it is played.
        engine: Runs the client.
    """

    config: SiteConfig
    terms: Terms
    data: FederatedData
    module: nn.Module
    layout: Layout
    played: Algorithm[Any]
    engine: Engine

    @property
    def client(self) -> ClientData:
        """The site's examples."""
        return self.data.clients[0]

    @property
    def training(self) -> LocalTraining:
        """What it does in a round."""
        return self.terms.training

    def fresh(self) -> Fleet:
        """What it keeps before its first round."""
        options = self.terms.options
        start = self.layout.read(self.module)
        return first_fleet(self.played, start, 1, self.layout.num_trainable, options.buffers)


def _client(config: SiteConfig, terms: Terms) -> ClientData:
    return site_client(config, terms.schema, seed=terms.options.seed, encoder=encoder_of(terms.model))


def ready_site(config: SiteConfig, terms: Terms) -> Site:
    """Data, network, method and engine of a site.

    Raises:
        FedmergeError: if the data or the network cannot be used.
    """
    keep_freed()
    options = terms.options
    shapes = terms.schema.without_examples([config.name])
    module = make_module(terms.model, shapes, options.seed, dtype=options.dtype)
    layout = layout_of(module, head=options.head, frozen=options.frozen)
    data = replace(shapes, clients=(_client(config, terms),))
    data = channels_last(in_precision(data, options.dtype))
    check_module(module, data, terms.training)
    client = data.clients[0]
    remember(module, torch.cat([part.inputs for part in (client.train, client.validation, client.test)]))
    place = Place(device_of(config.device), options.precision)
    engine = Sequential(module, layout, terms.training.descent(), objective=objective_of(data), place=place)
    return Site(config, terms, data, module, layout, played_method(terms.method, layout, options), engine)
