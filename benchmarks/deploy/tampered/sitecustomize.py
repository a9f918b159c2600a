"""Changes what a program of Flower's does, before it begins; Python loads this file because it is on PYTHONPATH.

``FEDMERGE_TAMPERED`` is ``WHAT:WHERE``: the change, and a part of the FLWR_HOME of the programs that are changed.

values     the site's answer of round 2 holds NaN
twice      the site's SuperNode sends its answer of round 1 twice
upload     the site's SuperNode ends once, between announcing its answer of round 2 and sending it
slow-disk  every fsync of the ServerApp takes a while longer
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

SECONDS = 0.3
ANSWERS = 3
"""Of a site until round 2: who it is, and two rounds."""


class _Changed(importlib.abc.MetaPathFinder):
    """Finds one module as usual, and changes it once it is loaded."""

    def __init__(self, name: str, change: Callable[[ModuleType], None]) -> None:
        self.name, self.change = name, change

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:  # noqa: ARG002
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        assert spec is not None
        loader: Any = spec.loader
        load = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            self.change(module)

        loader.exec_module = exec_module
        return spec


def values(module: Any) -> None:
    """Puts NaN into the answer of round 2."""
    honest = module.answer_to

    def answer_to(letter: Any, config: Any, **more: Any) -> Any:
        answer = honest(letter, config, **more)
        if json.loads(letter.text)["round"] != 2:
            return answer
        tensors = {name: tensor.clone() for name, tensor in answer.tensors.items()}
        next(iter(tensors.values())).view(-1)[3] = float("nan")
        return answer._replace(tensors=tensors)

    module.answer_to = answer_to


def twice(module: Any) -> None:
    """Announces the answer of round 1 again, as if what the SuperLink said of the first time had been lost."""
    once, count = module.FleetHttpClient.PushMessages, 0

    def push_messages(self: Any, *request: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        answer = once(self, *request, **options)
        if count == ANSWERS - 1:
            answer = once(self, *request, **options)
            print("sent a second time", flush=True)
        return answer

    module.FleetHttpClient.PushMessages = push_messages


def upload(module: Any) -> None:
    """Ends the SuperNode once, when it has announced its answer of round 2 and not sent the content yet."""
    announce, send = module.FleetHttpClient.PushMessages, module.FleetHttpClient.PushObject
    mark, count = Path(os.environ["FLWR_HOME"], "upload-cut"), 0

    def push_messages(self: Any, *request: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        return announce(self, *request, **options)

    def push_object(self: Any, *request: Any, **options: Any) -> Any:
        if count == ANSWERS and not mark.exists():
            mark.touch()
            os._exit(9)
        return send(self, *request, **options)

    module.FleetHttpClient.PushMessages, module.FleetHttpClient.PushObject = push_messages, push_object


def slow_disk() -> None:
    """Makes every fsync take longer."""
    fast = os.fsync

    def fsync(descriptor: Any) -> None:
        time.sleep(SECONDS)
        fast(descriptor)

    os.fsync = fsync  # type: ignore[assignment]


_what, _, _where = os.environ.get("FEDMERGE_TAMPERED", "").partition(":")
if _where and _where in os.environ.get("FLWR_HOME", ""):
    if _what == "values":
        sys.meta_path.insert(0, _Changed("fedmerge.deploy.client", values))
    elif _what == "twice":
        sys.meta_path.insert(0, _Changed("flwr.supernode.fleet_http_client", twice))
    elif _what == "upload":
        sys.meta_path.insert(0, _Changed("flwr.supernode.fleet_http_client", upload))
    elif _what == "slow-disk" and sys.argv[:1] and "serverapp" in " ".join(sys.orig_argv):
        slow_disk()
