"""What a site keeps from round to round, in its own folder: durable, and exact whatever dies in between.

A state is named by the round that it was made in. The server says which one a round goes on from (that of the site's
latest admitted reply), so a reply that was lost, refused or late changes nothing here either: what was made for it is
not gone on from. What the server can no longer ask for is removed.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from safetensors.torch import save

from fedmerge.core.errors import FedmergeError, UsageError
from fedmerge.core.files import make_folder, write_atomically
from fedmerge.core.tensor_files import read_tensors
from fedmerge.experiment.checkpoint import fleet_tensors, in_own_memory, restored_fleet
from fedmerge.experiment.lock import patient_lock
from fedmerge.runtime import Fleet

_RUN = re.compile("[0-9a-f]{16}")
_NAME, _ENDING = "private-", ".safetensors"


class BusyError(FedmergeError):
    """Another process of the site is at work; asked again later, the site answers."""


class PrivateState:
    """The private states of one site in one run.

    Args:
        folder: Of the site's states; made if it is not there.
        run: Identity of the run.
        fresh: What the site has before its first round: says what there must be.
    """

    def __init__(self, folder: Path, run: str, fresh: Fleet) -> None:
        self.folder = folder / hashlib.sha256(run.encode()).hexdigest()[:16]
        self._fresh = fresh
        self.is_empty = not fleet_tensors(fresh)
        """Whether the method keeps nothing on its clients."""

    def at(self, base: int, *, anew: bool = False) -> tuple[Fleet, str]:
        """The state that was made in round `base`, and a note for the server, empty if there is nothing to say.

        Args:
            base: 0 for the state before the first round.
            anew: Whether to begin anew where the state is gone.

        Raises:
            FedmergeError: if it is gone or damaged, and the site may not begin anew.
        """
        if base == 0 or self.is_empty:
            return self._fresh, ""
        path = self._path(base)
        try:
            return restored_fleet(self._fresh, read_tensors(path)), ""
        except FedmergeError as error:
            if anew:
                return self._fresh, f"its private state of round {base} is gone; it began anew"
            raise FedmergeError(
                f"{error}. The site's private state of round {base} is needed to go on: bring the folder back, or set "
                "`anew = true` in site.toml to begin anew with what a new site has"
            ) from error

    def save(self, round_number: int, fleet: Fleet) -> None:
        """Writes down what the site has after a round; on the disk when this returns."""
        if self.is_empty:
            return
        make_folder(self.folder)
        write_atomically(self._path(round_number), save(in_own_memory(fleet_tensors(fleet))), private=True)

    def forget_before(self, round_number: int, keep: Collection[int]) -> None:
        """Removes the states that were made before a round, but for some.

        Later ones stay: the order at hand may be an old one that was late.
        """
        for path in self.folder.glob(f"{_NAME}*{_ENDING}"):
            made = path.name.removeprefix(_NAME).removesuffix(_ENDING)
            if made.isdigit() and int(made) < round_number and int(made) not in keep:
                path.unlink(missing_ok=True)

    def forget_other_runs(self) -> None:
        """Removes the states of all runs but this one."""
        for path in self.folder.parent.iterdir():
            if path.is_dir() and path != self.folder and _RUN.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)

    def _path(self, round_number: int) -> Path:
        return self.folder / f"{_NAME}{round_number}{_ENDING}"


@contextmanager
def site_held(folder: Path, seconds: float) -> Iterator[None]:
    """Holds a site's folder of states for this process; waits while another process of the site ends.

    Args:
        folder: Made if it is not there.
        seconds: How long to wait.

    Raises:
        BusyError: if another process holds it for longer.
    """
    make_folder(folder)
    with ExitStack() as stack:
        try:
            stack.enter_context(patient_lock(folder, seconds))
        except UsageError as error:
            raise BusyError(str(error)) from error
        yield
