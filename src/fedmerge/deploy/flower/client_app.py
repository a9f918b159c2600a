"""The ClientApp of a site. Every message starts a fresh process, so that this module imports no more than it needs."""

from __future__ import annotations

import logging
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedmerge.core.errors import FedmergeError
from fedmerge.core.text import brief
from fedmerge.deploy.client import answer_to
from fedmerge.deploy.flower.wire import failure_records, letter_from, records_of
from fedmerge.deploy.site import SiteConfig, read_site

log = logging.getLogger(__name__)
app = ClientApp()


@app.query()
def hello(message: Message, context: Context) -> Message:
    """Says who the site is and how much data it has."""
    return _answer(message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    """The one message of a round."""
    return _answer(message, context)


@app.evaluate()
def take_model(message: Message, context: Context) -> Message:
    """Takes the site's own model of the selected round."""
    return _answer(message, context)


def _answer(message: Message, context: Context) -> Message:
    """The site's answer; where the user can mend something, the server is told what, instead of a traceback."""
    try:
        letter = letter_from(message.content)
        if isinstance(letter, str):
            raise FedmergeError("a message of the server says that it is a failure")  # noqa: TRY301 - told like others
        return Message(records_of(answer_to(letter, _site_of(context))), reply_to=message)
    except (FedmergeError, OSError) as error:
        log.error("%s", error)  # noqa: TRY400 - the user's to mend, no traceback
        return Message(failure_records(str(error)), reply_to=message)


def _site_of(context: Context) -> SiteConfig:
    """The site that this node is: its folder is named by the node's own configuration, or by its place in a simulation.

    Raises:
        FedmergeError: if it names none.
    """
    given = context.node_config
    if "site" in given:
        return read_site(Path(str(given["site"])))
    folder = Path(str(context.run_config.get("folder", "")))
    sites = sorted(path.parent for path in folder.glob("sites/*/site.toml"))
    place = given.get("partition-id")
    if isinstance(place, int) and 0 <= place < len(sites):
        return read_site(sites[place])
    raise FedmergeError(
        f"this node names no site: got the configuration {brief(dict(given))}; start it with `fedmerge deploy start "
        "site`, or with --node-config 'site=\"/path/to/the/folder/of/site.toml\"'"
    )
