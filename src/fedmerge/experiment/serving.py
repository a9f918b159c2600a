"""What later use of a run's models needs beside them: how inputs are scaled, what network it was, how it was trained.

Written as ``serving.json`` into every run folder.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedmerge.algorithms import ALGORITHMS
from fedmerge.core.errors import FedmergeError, UsageError, unknown_name
from fedmerge.core.files import write_atomically
from fedmerge.core.options import build_options
from fedmerge.core.strict_json import parse_json_table, read_bounded
from fedmerge.core.text import brief, shortened
from fedmerge.data import FederatedData
from fedmerge.data.form import InputForm, form_from_plain
from fedmerge.experiment.config import RunOptions, plain_options
from fedmerge.experiment.record import RunRecord
from fedmerge.models import NETWORKS
from fedmerge.training import LocalTraining

_NAME = "serving.json"
_KEYS = ("model", "training", "run", "inputs")
_OPTIONAL = ("model", "inputs")


@dataclass(frozen=True)
class Serving:
    """What a run's models are served with.

    Attributes:
        model: Table of the network's recipe; None for a module or function of the user's.
        training: What a client did in a round.
        options: Precision, buffers, head and the like.
        form: Of the raw inputs; None where it is not known.
        frozen_draw: Hash of what the network drew and never trains, see `frozen_draw`; None where there is nothing.
    """

    model: dict[str, Any] | None
    training: LocalTraining
    options: RunOptions
    form: InputForm | None
    frozen_draw: str | None = None


def frozen_draw(module: nn.Module) -> str | None:
    """Hash of the factors A of LoRA that are drawn from the run's seed and frozen: no file of a run holds them."""
    drawn = [p for name, p in module.named_parameters() if ".lora_A." in name and not p.requires_grad]
    digest = hashlib.sha256()
    for parameter in drawn:
        digest.update(parameter.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest() if drawn else None


def refuse_other_draw(serving: Serving, module: nn.Module, folder: Path) -> None:
    """Refuses a network whose frozen factors came out differently than in the run, under another torch for instance.

    Raises:
        FedmergeError: naming the folder.
    """
    if serving.frozen_draw is not None and serving.frozen_draw != frozen_draw(module):
        raise FedmergeError(
            f"{folder}: the frozen factors A of its adapters are drawn from the seed and came out differently here; "
            "use the versions of torch and peft that the run was made with (run.json)"
        )


def refuse_larger(serving: Serving, shape: tuple[int, ...], num_classes: int, num_params: int, folder: Path) -> None:
    """Refuses a network that is larger than what the folder holds, before any of it is allocated.

    Args:
        serving: Names the network.
        shape: Of one input.
        num_classes: K.
        num_params: Of the run's network, P, as ``run.json`` says.
        folder: Of the run; its tensors have P numbers at least.

    Raises:
        FedmergeError: naming both sizes.
    """
    name = None if serving.model is None else serving.model.get("name")
    if name in (None, "hf", "import") or serving.options.frozen:
        return
    recipe = recipe_of(serving, folder)
    path = folder / "models.safetensors"
    limit = min(num_params, path.stat().st_size if path.is_file() else num_params)
    try:
        with torch.device("meta"):
            made = recipe.build(shape, num_classes)
    except (RuntimeError, ValueError, TypeError, OverflowError, FedmergeError):  # told where it is made in earnest
        return
    size = sum(tensor.numel() for tensor in (*made.parameters(), *made.buffers()))
    if size > limit:
        raise FedmergeError(
            f"{folder} is damaged: serving.json names a network of {size:,} parameters; the run has {limit:,} at most; "
            "make it again"
        )


def recipe_table(model: Any) -> dict[str, Any] | None:
    """Name and options of a registered network; None for anything else.

    >>> from fedmerge.models.mlp import Mlp
    >>> recipe_table(Mlp(hidden=(32,)))
    {'name': 'mlp', 'hidden': [32]}
    """
    name = next((name for name in NETWORKS if NETWORKS[name].cls is type(model)), None)
    return None if name is None else {"name": name, **plain_options(model)}


def recipe_of(serving: Serving, folder: Path) -> Any:
    """The recipe of a run's network, from its folder.

    Raises:
        UsageError: if the network was the user's own.
        FedmergeError: if it cannot be made.
    """
    table = serving.model
    if table is None or table.get("name") == "import":
        raise UsageError(
            f"{folder}: its network is of your own and not in the folder; give it again: model=YOUR_MODULE in Python, "
            "--model path/to/file.py:Name on the command line"
        )
    faults: list[str] = []
    recipe = NETWORKS.build(table, "model", faults)
    if recipe is None:
        raise FedmergeError(f"{folder}: its network cannot be made: {'; '.join(faults)}")
    return recipe


def method_of(record: RunRecord) -> Any:
    """The method of a run, from its record.

    Raises:
        FedmergeError: if it cannot be made.
    """
    faults: list[str] = []
    own = {name: value for name, value in record.options.items() if name != "training"}
    method = ALGORITHMS.build({**own, "name": record.method}, "method", faults)
    if method is None:
        raise FedmergeError(f"the run's method cannot be made again: {'; '.join(faults)}")
    return method


def write_serving(
    folder: Path,
    model: Any,
    training: LocalTraining,
    options: RunOptions,
    data: FederatedData,
    module: nn.Module | None = None,
) -> None:
    """Writes ``serving.json``.

    Args:
        folder: Of the run.
        model: Recipe, module or function that the run was given.
        training: What a client did in a round.
        options: Of the run.
        data: Its clients.
        module: Its network.
    """
    plain: dict[str, Any] = {
        "model": recipe_table(model),
        "training": plain_options(training),
        "run": plain_options(options),
        "inputs": None if data.form is None else data.form.plain(),
    }
    drawn = None if module is None else frozen_draw(module)
    if drawn is not None:
        plain["frozen_draw"] = drawn
    write_atomically(folder / _NAME, json.dumps(plain, indent=1) + "\n")


def read_serving(folder: Path) -> Serving | None:
    """What `write_serving` wrote; None if the folder has no such file.

    Raises:
        FedmergeError: if the file is damaged; names it.
    """
    path = folder / _NAME
    if not path.is_file():
        return None
    try:
        return serving_from(read_bounded(path))
    except ValueError as error:
        raise FedmergeError(f"{path} is damaged: {shortened(str(error), 1000)}; make the run again") from error


def serving_from(content: bytes) -> Serving:
    """What the content of ``serving.json`` describes.

    Raises:
        ValueError: naming every value that does not fit.
    """
    plain = parse_json_table(content)
    missing = [key for key in _KEYS if key not in plain]
    unknown = [unknown_name("key", key, [*_KEYS, "frozen_draw"]) for key in plain if key not in {*_KEYS, "frozen_draw"}]
    if missing or unknown:
        raise ValueError("; ".join([*(f"it has no {key}" for key in missing), *unknown]))
    faults: list[str] = []
    for key, value in plain.items():
        if not isinstance(value, str if key == "frozen_draw" else dict) and not (value is None and key in _OPTIONAL):
            faults.append(f"{key}: got {brief(value)}; expected {'a text' if key == 'frozen_draw' else 'a table'}")
    if faults:
        raise ValueError("; ".join(faults))
    training = build_options(LocalTraining, plain["training"], "training", faults)
    options = build_options(RunOptions, plain["run"], "run", faults)
    if plain["model"] is not None:
        NETWORKS.build(plain["model"], "model", faults)
    try:
        form = None if plain["inputs"] is None else form_from_plain(plain["inputs"])
    except FedmergeError as error:
        faults.append(str(error))
    if training is None or options is None or faults:
        raise ValueError("; ".join(faults))
    return Serving(plain["model"], training, options, form, plain.get("frozen_draw"))
