"""Every module of this folder holds one method; importing the folder files them all."""

from __future__ import annotations

from typing import Any

from fedmerge.core.protocol import Algorithm
from fedmerge.core.registry import Registry

ALGORITHMS: Registry[Algorithm[Any]] = Registry("method")
algorithm = ALGORITHMS.register
