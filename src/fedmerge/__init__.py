"""Personalized federated learning: every client gets its own merge of a few shared models (arXiv:2504.06768).

Names are loaded when they are first used, so that importing one room (say ``fedmerge.core``) stays cheap.

>>> import fedmerge
>>> fedmerge.__version__.count(".")
2
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from fedmerge._version import __version__

# torch reads this when it first allocates: large tensors in large pages. A round makes its vectors anew, and the first
# touch of small pages takes several times as long as writing the numbers does.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

if TYPE_CHECKING:
    from fedmerge.api import (
        Comparison,
        Exported,
        Onboarded,
        Run,
        compare,
        export,
        load_run,
        onboard,
        resume,
        run,
        run_config,
    )
    from fedmerge.core.errors import DataError, FedmergeError, UsageError
    from fedmerge.data import (
        ClientData,
        Examples,
        FederatedData,
        from_arrays,
        from_dataset,
        from_folder,
        from_frame,
        from_texts,
    )
    from fedmerge.training import LocalTraining

_HOMES = {
    "fedmerge.api": (
        "Comparison",
        "Exported",
        "Onboarded",
        "Run",
        "compare",
        "export",
        "load_run",
        "onboard",
        "resume",
        "run",
        "run_config",
    ),
    "fedmerge.core.errors": ("DataError", "FedmergeError", "UsageError"),
    "fedmerge.data": (
        "ClientData",
        "Examples",
        "FederatedData",
        "from_arrays",
        "from_dataset",
        "from_folder",
        "from_frame",
        "from_texts",
    ),
    "fedmerge.training": ("LocalTraining",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'fedmerge' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


__all__ = [
    "ClientData",
    "Comparison",
    "DataError",
    "Examples",
    "Exported",
    "FederatedData",
    "FedmergeError",
    "LocalTraining",
    "Onboarded",
    "Run",
    "UsageError",
    "__version__",
    "compare",
    "export",
    "from_arrays",
    "from_dataset",
    "from_folder",
    "from_frame",
    "from_texts",
    "load_run",
    "onboard",
    "resume",
    "run",
    "run_config",
]
