"""The ClientApp of a site. Every message starts a fresh process, so that this module imports no more than it needs.

What the site's own people should know is logged in lines that are marked (`NewsFormatter`), among all that Flower logs.
"""

from __future__ import annotations

import logging
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedmerge.core.errors import FedmergeError
from fedmerge.core.text import brief
from fedmerge.deploy.client import answer_to
from fedmerge.deploy.flower.wire import Refused, failure_records, letter_from, records_of
from fedmerge.deploy.messages import Letter
from fedmerge.deploy.news import NewsFormatter
from fedmerge.deploy.private_state import BusyError
from fedmerge.deploy.site import SiteConfig, read_site
from fedmerge.deploy.telling import tellable, told_to_server

log = logging.getLogger(__name__)
app = ClientApp()
_SITE = "site"
"""In a node's configuration: the site's folder. Its messages have processes of their own; a simulation's share some."""


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
    """The site's answer, or that it has none. No error leaves this function: Flower would send its whole text."""
    if _SITE in context.node_config:
        _speak()
    try:
        return Message(records_of(_answered(message, context)), reply_to=message)
    except (FedmergeError, OSError) as error:
        log.error("%s", error)  # noqa: TRY400 - the user's to mend, no traceback
        return _refusal(error, message)
    except Exception as error:  # whatever the site's own data or function bring about
        log.exception("the site's program failed")
        return _refusal(error, message)


def _speak() -> None:
    """From now on what this package logs goes to the site's log, marked as news."""
    own = logging.getLogger("fedmerge")
    if not own.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(NewsFormatter())
        own.addHandler(handler)
        own.setLevel(logging.INFO)


def _refusal(error: Exception, message: Message) -> Message:
    return Message(failure_records(told_to_server(error), busy=isinstance(error, BusyError)), reply_to=message)


def _answered(message: Message, context: Context) -> Letter:
    with tellable():
        letter = letter_from(message.content)
        if isinstance(letter, Refused):
            raise FedmergeError("a message of the server says that it is a failure")
    return answer_to(letter, _site_of(context), alone=_SITE in context.node_config)


def _site_of(context: Context) -> SiteConfig:
    """The site that this node is: its folder is named by the node's own configuration, or by its place in a simulation.

    Raises:
        FedmergeError: if it names none.
    """
    given = context.node_config
    if _SITE in given:
        return read_site(Path(str(given[_SITE])))
    folder = Path(str(context.run_config.get("folder", "")))
    sites = sorted(path.parent for path in folder.glob("sites/*/site.toml"))
    place = given.get("partition-id")
    if isinstance(place, int) and 0 <= place < len(sites):
        return read_site(sites[place])
    raise FedmergeError(
        f"this node names no site: got the configuration {brief(dict(given))}; start it with `fedmerge deploy start "
        "site`, or with --node-config 'site=\"/path/to/the/folder/of/site.toml\"'"
    )
