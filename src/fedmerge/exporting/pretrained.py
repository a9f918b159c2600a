"""A client's pretrained model with its adapter, as plain parts of PEFT and transformers."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedmerge.core.errors import UsageError
from fedmerge.exporting.client import Client
from fedmerge.exporting.files import write_tensors
from fedmerge.models._adapted import Adapted
from fedmerge.models._blocks import Remembering
from fedmerge.models._weights import quietly, require_extra, weights_folder
from fedmerge.models.hf import Hf

_PUBLIC = {"minilm": "sentence-transformers/all-MiniLM-L6-v2"}
"""Hub names of the bases that fedmerge has a short name for."""
INSIDE = "base_model.model."
"""PEFT's name for the network within."""


@dataclass(frozen=True)
class Pretrained:
    """What a client's model is made of.

    Attributes:
        recipe: That made it.
        body: PEFT's network around the base, with the client's values; frozen weights are shared with the run.
        head: Output layer on the mean of the hidden states; None where the body gives the outputs itself.
        classes: Names of the outputs, in order; empty for a language model.
        image: Height and width of images; None for texts.
        saved: Parts of the body that are the client's as a whole: its output layer and what is fresh beside it.
        replaces: Whether the base brings an output layer of its own, which the client's takes the place of.
    """

    recipe: Hf
    body: Any
    head: nn.Linear | None
    classes: tuple[str, ...]
    image: tuple[int, int] | None
    saved: tuple[str, ...]
    replaces: bool = False

    @property
    def base_name(self) -> str:
        """What others load the base by."""
        return _PUBLIC.get(self.recipe.path, self.recipe.path)

    @property
    def base_title(self) -> str:
        """What it is called: its hub name, or the last part of a folder's path."""
        return Path(self.base_name).name if Path(self.base_name).is_dir() else self.base_name

    @property
    def base_folder(self) -> str:
        """Where it is loaded from here."""
        return weights_folder(self.recipe.path)


def pretrained_of(client: Client) -> Pretrained:
    """The parts of a client's model, cut to its own classes.

    Raises:
        UsageError: if its network is not a pretrained model by recipe, or if its model is several networks.
    """
    if not isinstance(client.personal, Tensor):
        raise UsageError(
            f"clients of method {client.trained.record.method!r} use several networks at once, which one adapter "
            "cannot hold; export a run of another method"
        )
    return parts_of(client, client.personal)


def parts_of(client: Client, vector: Tensor) -> Pretrained:
    """As `pretrained_of`, with other parameters in the client's network."""
    require_extra()
    module, recipe = client.module_of(vector), client.trained.recipe
    if not isinstance(module, Adapted) or not isinstance(recipe, Hf):
        raise UsageError(
            f"this run's network is a {type(module).__name__} without an adapter of the recipe 'hf'; export it with "
            "kind 'torch' or 'onnx'"
        )
    body: Any = module.body
    _show_blocks(body)
    saved = tuple(body.peft_config["default"].modules_to_save or ())
    parts = Pretrained(recipe, body, None, (), module.image, saved)
    if recipe.task == "complete":
        return parts
    own = list(client.own_classes)
    parts = replace(parts, classes=client.own_class_names)
    if isinstance(module.head, nn.Linear):
        return replace(parts, head=_cut(module.head, own))
    return _with_own_outputs(parts, own, len(client.trained.record.class_names))


def _show_blocks(body: nn.Module) -> None:
    """Puts the blocks of the frozen lower part back in their places, in place."""
    for part in list(body.modules()):
        for name, child in list(part.named_children()):
            if isinstance(child, Remembering):
                setattr(part, name, child.block)


def _cut(layer: nn.Linear, rows: list[int]) -> nn.Linear:
    """The output layer with these outputs only, in this order."""
    cut = nn.Linear(layer.in_features, len(rows), bias=layer.bias is not None, dtype=layer.weight.dtype)
    with torch.no_grad():
        cut.weight.copy_(layer.weight[rows])
        if layer.bias is not None:
            cut.bias.copy_(layer.bias[rows])
    return cut.requires_grad_(layer.weight.requires_grad)


def _with_own_outputs(parts: Pretrained, own: list[int], num_classes: int) -> Pretrained:
    """The body with its output layer cut, and its configuration naming what is left."""
    import peft  # noqa: PLC0415 - optional extra

    base, config = parts.body.get_base_model(), parts.body.config
    name = _output_layer(base, num_classes)
    root = name.split(".")[0]
    saved, replaces = parts.saved, root not in parts.saved
    if replaces:  # the checkpoint's own output layer, which was not trained
        wrapping: Any = peft.utils.ModulesToSaveWrapper
        wrapper = wrapping(base.get_submodule(root), "default")
        wrapper.set_adapter("default")
        _put(base, root, wrapper)
        name = ".".join([root, "modules_to_save.default", *name.split(".")[1:]])
        saved = (*saved, root)
    _put(base, name, _cut(base.get_submodule(name), own))
    config.id2label = dict(enumerate(parts.classes))
    config.label2id = {label: k for k, label in enumerate(parts.classes)}
    return replace(parts, saved=saved, replaces=replaces)


def _put(module: nn.Module, name: str, part: nn.Module) -> None:
    """Replaces a sub-module, in place."""
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, part)


def _output_layer(base: Any, num_classes: int) -> str:
    """Name of the last linear layer beside the pretrained base that has an output for each class.

    Raises:
        UsageError: if there is none.
    """
    inside = base.base_model_prefix + "."
    found: list[str] = [
        name
        for name, part in base.named_modules()
        if isinstance(part, nn.Linear)
        and part.out_features == num_classes
        and not name.startswith(inside)
        and ".original_module" not in name
    ]
    if not found:
        raise UsageError(
            f"{type(base).__name__} has no linear output layer that could be cut to a client's classes; export a run "
            "with pooling='mean'"
        )
    return found[-1]


def adapter_tensors(parts: Pretrained) -> dict[str, Tensor]:
    """All that PEFT saves of the body, by its names."""
    import peft  # noqa: PLC0415 - optional extra

    with quietly():
        tensors: dict[str, Tensor] = peft.get_peft_model_state_dict(parts.body, save_embedding_layers=False)
    return tensors


def head_tensors(head: nn.Linear) -> dict[str, Tensor]:
    """Weight and bias of the output layer on the mean."""
    return {"weight": head.weight, "bias": head.bias}


def write_adapter(folder: Path, parts: Pretrained, tensors: Mapping[str, Tensor], saved: tuple[str, ...]) -> None:
    """A folder that ``PeftModel.from_pretrained`` loads.

    Args:
        folder: Is there.
        parts: Give the configuration.
        tensors: By PEFT's names.
        saved: Parts of the network that are there as a whole.
    """
    config = copy.deepcopy(parts.body.peft_config["default"])
    config.base_model_name_or_path, config.inference_mode = parts.base_name, True
    config.modules_to_save = sorted(saved) or None
    config.save_pretrained(str(folder))
    write_tensors(folder / "adapter_model.safetensors", tensors)


def write_peft(client: Client, folder: Path) -> Pretrained:
    """Adapter, and ``head.safetensors`` where the output layer is not the model's own."""
    parts = pretrained_of(client)
    write_adapter(folder, parts, adapter_tensors(parts), parts.saved)
    if parts.head is not None:
        write_tensors(folder / "head.safetensors", head_tensors(parts.head))
    return parts


def merged_body(parts: Pretrained) -> Any:
    """The base with the adapter folded in, in memory of its own."""
    return copy.deepcopy(parts.body).merge_and_unload()


def write_merged(client: Client, folder: Path) -> Pretrained:
    """A transformers folder: weights, configuration, tokenizer; ``head.safetensors`` as for `write_peft`."""
    from transformers import AutoConfig, AutoTokenizer  # noqa: PLC0415 - optional extra

    parts = pretrained_of(client)
    with quietly():
        whole = merged_body(parts).to(getattr(torch, parts.recipe.dtype))
        original = AutoConfig.from_pretrained(parts.base_folder, trust_remote_code=False)
        for name, value in vars(original).items():
            if "dropout" in name or name.endswith("_pdrop"):
                setattr(whole.config, name, value)
        whole.save_pretrained(str(folder))
        if parts.image is None:
            AutoTokenizer.from_pretrained(parts.base_folder, trust_remote_code=False).save_pretrained(str(folder))
    if parts.head is not None:
        write_tensors(folder / "head.safetensors", head_tensors(parts.head))
    return parts
