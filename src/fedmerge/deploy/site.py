"""A site's own configuration, ``site.toml``: who it is, and where its examples are. The server never sees it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedmerge.core.errors import UsageError, together, unknown_name
from fedmerge.core.options import build_options, check_options, option, option_fields
from fedmerge.core.text import brief
from fedmerge.deploy.address import host_and_port

FILE = "site.toml"
PLACES = ("path", "huggingface", "python")
"""Where examples can be; a site names one."""
_ONLY_FOR: dict[str, tuple[str, ...]] = {
    "text_column": ("path",),
    "size": ("path", "huggingface"),
    "subset": ("huggingface",),
    "splits": ("huggingface",),
    "validation_splits": ("huggingface",),
    "test_splits": ("huggingface",),
    "input_column": ("huggingface",),
    "answer_column": ("huggingface",),
    "max_items": ("huggingface",),
    "label_column": ("path", "huggingface"),
    "options": ("python",),
}


@dataclass(frozen=True)
class SiteData:
    """Where a site's own examples are: exactly one of path, huggingface and python."""

    path: str | None = option(
        None, help="a .npz, .csv or .parquet file; a folder with train, validation and test files; or images by class"
    )
    huggingface: str | None = option(None, help="id on the Hub, or a folder or file in its formats")
    python: str | None = option(
        None, help="'package.module:function' or 'path/to/file.py:function' of this site; gives (x, y) or three of them"
    )
    label_column: str | None = option(None, help="column that holds the class; the federation's name for it by default")
    text_column: str | None = option(None, help="path: column that holds texts; the federation's name by default")
    size: int | None = option(None, at_least=1, help="images are scaled to this many pixels per side")
    subset: str | None = option(None, help="huggingface: configuration of the data set, where it has several")
    splits: tuple[str, ...] = option((), help="huggingface: splits that are trained on; all if no split is named")
    validation_splits: tuple[str, ...] = option((), help="huggingface: for validation; cut from the others by default")
    test_splits: tuple[str, ...] = option((), help="huggingface: for the test; cut from the others by default")
    input_column: str | None = option(None, help="huggingface: column of images, numbers or texts")
    answer_column: str | None = option(None, help="huggingface: column of completions or of lists of tags")
    max_items: int | None = option(None, at_least=1, help="huggingface: keep this many train items, drawn at random")
    options: dict[str, Any] | None = option(None, help="python: keyword arguments of the function")

    def __post_init__(self) -> None:
        check_options(self)
        faults = _data_faults(vars(self))
        if faults:
            raise UsageError("\n".join(f"SiteData{f}" if f.startswith(".") else f.removeprefix(": ") for f in faults))

    @property
    def place(self) -> str:
        """Which of the three it is."""
        return next(place for place in PLACES if getattr(self, place) is not None)

    def within(self, folder: Path) -> SiteData:
        """The same with paths that start from a folder."""
        if self.path is not None:
            return replace(self, path=str(folder / Path(self.path).expanduser()))
        if self.python is not None and self.python.partition(":")[0].endswith(".py"):
            location, _, name = self.python.partition(":")
            return replace(self, python=f"{folder / Path(location).expanduser()}:{name}")
        if self.huggingface is not None and (folder / Path(self.huggingface).expanduser()).exists():
            return replace(self, huggingface=str(folder / Path(self.huggingface).expanduser()))
        return self


@dataclass(frozen=True)
class SiteConfig:
    """A site, as its own ``site.toml`` describes it."""

    name: str = option(help="of this site, as the federation knows it")
    server: str = option(help="host:port of the federation's server")
    data: SiteData = option(help="where this site's examples are")
    state: str = option("state", help="folder for what never leaves the site, from the site's folder")
    device: str = option("cpu", help="where the site computes: cpu, cuda or cuda:NUMBER")
    anew: bool = option(False, help="begin anew where the site's own state is lost, instead of refusing to go on")
    folder: Path = option(Path(), help="of the site; not in the file, which lies in it")

    def __post_init__(self) -> None:
        check_options(self)
        faults = _own_faults(vars(self))
        if faults:
            raise UsageError("\n".join(f"SiteConfig{fault}" for fault in faults))

    @property
    def state_folder(self) -> Path:
        """What never leaves the site."""
        return self.folder / Path(self.state).expanduser()


def read_site(folder: Path | str) -> SiteConfig:
    """Reads ``site.toml`` of a site's folder; paths in it start from there.

    Nothing but this file says what the site loads or runs: a function that `data.python` names is the site's own, and
    no message of a server can name another. Whoever is given a site's folder by somebody else reads its ``[data]``
    first.

    Raises:
        UsageError: with one line per fault, all of them together.
    """
    from fedmerge.experiment.config import read_toml  # noqa: PLC0415 - brings every method, which data do not need

    folder = Path(folder)
    path = folder / FILE
    if not path.is_file():
        raise UsageError(f"{folder} is no site: it has no {FILE}; the server makes one with `fedmerge deploy init`")
    table = read_toml(path)
    faults = _faults_of(table)
    given = {key: value for key, value in table.items() if key != "folder"}
    site = build_options(SiteConfig, {"data": {}, **given, "folder": folder.absolute()}, "", faults)
    if site is None or faults:
        lines = dict.fromkeys(fault.removeprefix(".").removeprefix(": ") for fault in faults)
        raise UsageError(f"{path}:\n{together(lines)}")
    return replace(site, data=site.data.within(site.folder))


def _faults_of(table: Mapping[str, Any]) -> list[str]:
    """What single options do not tell, also where others of them are wrong."""
    faults = _own_faults(table)
    data = table.get("data", {})
    if isinstance(data, Mapping):
        faults += [f".data{fault}" for fault in _data_faults(data)]
    if "folder" in table:
        names = [name for name in option_fields(SiteConfig) if name != "folder"]
        faults.append(f": {unknown_name('option', 'folder', names)}")
    return faults


def _own_faults(values: Mapping[str, Any]) -> list[str]:
    """Name, server and device, where they are texts."""
    from fedmerge.deploy.federation import SITE_NAME, is_site_name  # noqa: PLC0415 - as above

    name, server, device = (values.get(key) for key in ("name", "server", "device"))
    faults = []
    if isinstance(name, str) and not is_site_name(name):
        faults.append(f".name: got {brief(name)}; expected {SITE_NAME}")
    if isinstance(server, str):
        try:
            host_and_port(server)
        except UsageError as error:
            faults.append(f".server: {error}")
    if isinstance(device, str) and not re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?", device):
        faults.append(f".device: got {brief(device)}; expected cpu, cuda or cuda:NUMBER")
    return faults


def _data_faults(values: Mapping[str, Any]) -> list[str]:
    """Exactly one place, and no option of another place's: none is accepted and ignored."""
    places = [place for place in PLACES if values.get(place) is not None]
    if len(places) != 1:
        given = " and ".join(places) or "none of them"
        return [f": got {given}; expected exactly one of {', '.join(PLACES)}: where this site's examples are"]
    faults = [
        f".{key}: belongs to {' and '.join(owners)}, not to {places[0]}; leave it out"
        for key, owners in _ONLY_FOR.items()
        if values.get(key) and places[0] not in owners
    ]
    python, path = values.get("python"), values.get("path")
    if isinstance(python, str) and not re.fullmatch(r"[^:]+:[A-Za-z_]\w*", python):
        faults.append(f".python: got {brief(python)}; expected 'package.module:function' or 'path/to/file.py:function'")
    if path == "" or values.get("huggingface") == "":
        faults.append(f".{places[0]}: got an empty text; expected a name")
    if (values.get("validation_splits") or values.get("test_splits")) and not values.get("splits"):
        faults.append(".splits: none named beside those of validation or test; say which are trained on")
    return faults
