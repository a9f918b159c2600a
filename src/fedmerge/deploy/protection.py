"""Differential privacy in a deployment: the seed is known to all sites, so what hides data comes from secrets.

A site whose examples are protected (``training.dp_clip``) draws batches and noise from a secret of its own, which never
leaves its folder of states. Each release has a key of its own: an HMAC of all that the update depends on. The same
message gets the same answer, bit for bit, and no two different answers share noise, which their difference would free
of it. No more different answers are given to a run than it has rounds: what epsilon is counted for.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fedmerge.algorithms.dp_fedmerge import DpFedMerge
from fedmerge.core.errors import FedmergeError
from fedmerge.core.files import write_atomically
from fedmerge.core.options import build_options
from fedmerge.core.private import KEY_BITS
from fedmerge.core.strict_json import parse_json_table, read_bounded

if TYPE_CHECKING:
    from fedmerge.deploy.federation import Terms

log = logging.getLogger(__name__)

FILE = "protection.json"
"""In a site's folder of states: its secret, and what it was used for."""


def privacy_faults(terms: Terms) -> list[str]:
    """One line for everything in a federation's terms that voids a promise of differential privacy which they make."""
    method, training = terms.method, terms.training
    clients = isinstance(method, DpFedMerge) and method.noise_multiplier > 0
    examples = training.dp_clip is not None and bool(training.dp_noise)
    faults = []
    if isinstance(method, DpFedMerge) and clients:
        faults += _faults_of_clients(method)
    if (clients or examples) and terms.schema.scale == "pooled":
        faults.append(
            "data.scale: got 'pooled'; expected 'given': sums of the sites' columns leave them without noise, and the "
            "scale made of them goes to all. Give mean and std that are public"
        )
    return faults


def _faults_of_clients(method: DpFedMerge) -> list[str]:
    faults = []
    if not method.secret_noise:
        faults.append(
            "method.secret_noise: got false; expected true: every site has the run's seed and could take the noise "
            "away. Set method.secret_noise=true"
        )
    if method.sampling_rate < 1:
        faults.append(
            f"method.sampling_rate: got {method.sampling_rate:g}; expected 1: cohorts come from the seed, which every "
            "site has, and a rate below 1 lowers epsilon only if nobody can tell who takes part. Set "
            "method.sampling_rate=1 and fraction=1"
        )
    return faults


# --- at a site ---


@dataclass(frozen=True)
class _Ledger:
    """What a site's protection remembers.

    Attributes:
        secret: 256 bits as hexadecimal digits.
        answered: Marks of the different answers, by the run they went to.
    """

    secret: str
    answered: dict[str, tuple[str, ...]] = field(default_factory=dict)


def seed_of_release(folder: Path, *, run: str, rounds: int, facts: Sequence[int | float | str], tree: Any) -> int:
    """The seed of the batches and the noise of one protected update; noted before it is used.

    Args:
        folder: Of the site's states; held by this process.
        run: Identity of the run.
        rounds: Different answers that the run may get.
        facts: That the update depends on.
        tree: Tensors that it depends on: what was received, what the site keeps, its examples.

    Raises:
        FedmergeError: if the run has had its answers, or the file with the secret is damaged.
        OSError: if the file cannot be read or written.
    """
    ledger = _ledger(folder / FILE)
    key = _key(bytes.fromhex(ledger.secret), [run, *facts], tree)
    mark, place = hashlib.sha256(key).hexdigest()[:32], hashlib.sha256(run.encode()).hexdigest()[:32]
    known = ledger.answered.get(place, ())
    if mark not in known:
        _refuse_surplus(len(known), rounds)
        if not known and ledger.answered:
            log.warning(
                "run %d that gets protected updates of this site's examples: their epsilons add up",
                len(ledger.answered) + 1,
            )
        noted = _Ledger(ledger.secret, {**ledger.answered, place: (*known, mark)})
        write_atomically(folder / FILE, json.dumps(asdict(noted)), private=True)
    return int.from_bytes(key, "big")


def _refuse_surplus(given: int, rounds: int) -> None:
    if given >= rounds:
        raise FedmergeError(
            f"the run has had {given} different protected updates of this site's examples; expected {rounds} at most, "
            "one for each round, which is what epsilon is counted for"
        )


def _ledger(path: Path) -> _Ledger:
    if not path.exists():
        return _Ledger(secrets.token_hex(KEY_BITS // 8))
    faults: list[str] = []
    try:
        found = build_options(_Ledger, parse_json_table(read_bounded(path)), FILE, faults)
        if found is not None and len(bytes.fromhex(found.secret)) * 8 == KEY_BITS:
            return found
    except ValueError as error:
        faults.append(str(error))
    raise FedmergeError(
        f"{path} is damaged ({'; '.join(faults) or 'no secret of 256 bits'}); it holds the secret behind this site's "
        "noise and what it was used for. Bring it back, or remove it to begin with a new secret: what was answered "
        "before then adds to epsilon uncounted"
    )


def _key(secret: bytes, facts: Sequence[int | float | str], tree: Any) -> bytes:
    """HMAC-SHA256 of facts and tensors, bit for bit."""
    mac = hmac.new(secret, json.dumps(facts).encode(), "sha256")
    for leaf in tree_leaves(tree):
        mac.update(f"\n{leaf.dtype} {list(leaf.shape)}\n".encode())
        mac.update(_bytes_of(leaf))
    return mac.digest()


def _bytes_of(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
