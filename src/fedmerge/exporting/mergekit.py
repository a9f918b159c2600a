"""A recipe for mergekit: the server's models as adapters, and the client's weights of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from fedmerge.core.adapters import Pair, pairs_of
from fedmerge.core.errors import UsageError
from fedmerge.core.files import write_atomically
from fedmerge.core.protocol import innermost, server_models, state_tensors
from fedmerge.core.ranges import gathered, woven
from fedmerge.core.vector import Layout
from fedmerge.exporting.client import Client
from fedmerge.exporting.files import write_tensors
from fedmerge.exporting.pretrained import (
    INSIDE,
    Pretrained,
    adapter_tensors,
    head_tensors,
    parts_of,
    pretrained_of,
    write_adapter,
)
from fedmerge.models._weights import quietly

RECIPE = "recipe.yaml"


def write_mergekit(client: Client, folder: Path) -> tuple[Pretrained, float]:
    """``recipe.yaml``, ``model-0`` … ``model-<d−1>`` and, where the client has an output layer, ``head.safetensors``.

    The recipe cannot do without the client's merging weights: only its owner may read it.

    Returns:
        The client's parts, and how far the recipe's result is from its model, see `difference`.

    Raises:
        UsageError: if the client's model is not one weighted mean of whole models of the server, or mergekit could not
            read the base's name.
    """
    parts, row = pretrained_of(client), row_of(client)
    _refuse_unreadable(parts)
    models = whole_models(client)
    for j, vector in enumerate(models):
        place = folder / f"model-{j}"
        place.mkdir()
        own = parts_of(client, vector)
        write_adapter(place, own, _adapters_only(own, adapter_tensors(own)), ())
    write_atomically(folder / RECIPE, _recipe(parts, row), private=True)
    output = _output(parts)
    if output:
        write_tensors(folder / "head.safetensors", output)
    return parts, difference(client, models, torch.tensor(row, dtype=torch.float64))


def row_of(client: Client) -> list[float]:
    """The client's merging weights.

    Raises:
        UsageError: for methods without them, where groups of layers have weights of their own, and for adapters whose
            weights are not known to be averaged with them.
    """
    trained, row = client.trained, client.row()
    models = server_models(_own_state(client))
    if row is None or models is None or len(models) != len(row):
        raise UsageError(
            f"method {trained.record.method!r} has no merging weights, which a recipe for mergekit is made of; take "
            "kind 'peft' or 'merged'"
        )
    blocks = state_tensors(_own_state(client)).get("blocks")
    if blocks is not None and len(blocks) > 1:
        raise UsageError(
            f"this run's layers have merging weights of their own ({len(blocks)} groups); a linear recipe has one per "
            "model: take kind 'peft' or 'merged'"
        )
    _refuse_other_adapters(client)
    return row


def _refuse_other_adapters(client: Client) -> None:
    trained = client.trained
    if trained.recipe.adapter == "dora":
        raise UsageError("DoRA's weights are no linear function of what is merged; take kind 'peft' or 'merged'")
    if _unpaired_factors(trained.setup.layout):
        raise UsageError(
            "how far a recipe is from the client's model is known for adapters of linear layers only, and this run "
            "also adapts embeddings or convolutions; take kind 'peft' or 'merged'"
        )


def _unpaired_factors(layout: Layout) -> bool:
    """Whether a factor A travels whose product is not one of two matrices."""
    factors = [slot for slot in layout.slots if ".lora_A." in slot.name or ".lora_embedding_A." in slot.name]
    paired = {pair.a for pair in pairs_of(layout)}
    return any((slot.start, slot.stop) not in paired for slot in factors)


def _own_state(client: Client) -> object:
    """The method's own server state."""
    return innermost(client.trained.progress.state)


def _refuse_unreadable(parts: Pretrained) -> None:
    name = parts.base_name
    if "+" in name or "@" in name:
        raise UsageError(f"mergekit reads '+' and '@' in {name!r} as signs of its own; give the base another path")


def whole_models(client: Client) -> Float[Tensor, "d P"]:
    """The server's models, with the client's own part where clients keep one.

    Raises:
        UsageError: if the server's models are not models of this network.
    """
    setup, models = client.trained.setup, server_models(_own_state(client))
    names = setup.options.keep
    kept = setup.layout.below(names) if names else ()
    size = setup.layout.num_params - sum(stop - start for start, stop in kept)
    if models is None or models.shape[1] != size or not isinstance(client.personal, Tensor):
        raise UsageError(
            f"method {client.trained.record.method!r} keeps no whole models on the server; take kind 'peft' or 'merged'"
        )
    own = gathered(client.personal, kept)
    return torch.stack([woven(own, vector, kept) for vector in models])


def _recipe(parts: Pretrained, row: Sequence[float]) -> str:
    """YAML that mergekit reads; paths of adapters are as seen from the folder, marked as no hub names."""
    lines = ["merge_method: linear", f"dtype: {parts.recipe.dtype}", "models:"]
    for j, weight in enumerate(row):
        lines += [f"  - model: {json.dumps(f'{parts.base_name}+./model-{j}')}", "    parameters:"]
        lines += [f"      weight: {weight!r}"]
    return "\n".join(lines) + "\n"


def _is_saved(name: str, saved: Sequence[str]) -> bool:
    return any(name.startswith(f"{INSIDE}{part}.") for part in saved)


def _adapters_only(parts: Pretrained, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The adapters, named as in the class that mergekit loads: the one that the base's configuration names."""
    adapters = {name: tensor for name, tensor in tensors.items() if not _is_saved(name, parts.saved)}
    base = parts.body.get_base_model()
    prefix = base.base_model_prefix + "."
    mine = "" if base.base_model is base else prefix
    theirs = "" if _loads_bare(parts) else prefix
    renamed = {}
    for name, tensor in adapters.items():
        inside = name.removeprefix(INSIDE)
        is_shared = inside.startswith(mine)
        renamed[INSIDE + (theirs + inside.removeprefix(mine) if is_shared else inside)] = tensor
    return renamed


def _loads_bare(parts: Pretrained) -> bool:
    """Whether the base's configuration names the bare network, without any output layer.

    Raises:
        UsageError: if it names none, so that mergekit would not load it.
    """
    from transformers import AutoConfig  # noqa: PLC0415 - optional extra
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES  # noqa: PLC0415

    with quietly():
        names = AutoConfig.from_pretrained(parts.base_folder, trust_remote_code=False).architectures
    if not names:
        raise UsageError(
            f"{parts.base_name!r}: its config.json names no architecture, which mergekit needs; take kind 'merged'"
        )
    return names[0] in MODEL_MAPPING_NAMES.values()


def _output(parts: Pretrained) -> dict[str, Tensor]:
    """The client's own parts beside the adapters, which mergekit leaves alone."""
    if parts.head is not None:
        return head_tensors(parts.head)
    tensors = adapter_tensors(parts)
    return {name.removeprefix(INSIDE): t for name, t in tensors.items() if _is_saved(name, parts.saved)}


def difference(client: Client, models: Float[Tensor, "d P"], row: Float[Tensor, " d"]) -> float:
    """How far the client's adapters are from the weighted mean of the server's, relative to that mean.

    ‖B A − Σ_j a_j B_j A_j‖ / ‖Σ_j a_j B_j A_j‖ in the Frobenius norm, all layers together. Adapters that are no pair of
    factors in the vector (a frozen A, IA3) count with their entries, in which their weights are linear.
    """
    layout = client.trained.setup.layout
    if not isinstance(client.personal, Tensor):
        raise TypeError("an ensemble has no adapters of its own")
    weights = row / row.sum()
    vectors = torch.cat([models, client.personal[None]]).double()
    signed = torch.cat([-weights, torch.ones(1, dtype=torch.float64)])
    mean = torch.cat([weights, torch.zeros(1, dtype=torch.float64)])
    off, size = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for pair in pairs_of(layout):
        off += _squared(pair, vectors, signed)
        size += _squared(pair, vectors, mean)
    for start, stop in _single(layout):
        off += (signed @ vectors[:, start:stop]).square().sum()
        size += (mean @ vectors[:, start:stop]).square().sum()
    return float((off / size).sqrt()) if size > 0 else 0.0


def _squared(pair: Pair, vectors: Float[Tensor, "n P"], weights: Float[Tensor, " n"]) -> Tensor:
    """‖Σ_i w_i B_i A_i‖², by QR decompositions: small differences are not lost in large products."""
    left = (weights[:, None, None] * pair.left(vectors)).permute(1, 0, 2).flatten(1)
    right = pair.right(vectors).flatten(0, 1).T
    product: Tensor = torch.linalg.qr(left)[1] @ torch.linalg.qr(right)[1].T
    return product.square().sum()


def _single(layout: Layout) -> list[tuple[int, int]]:
    """Ranges of adapters that are no pair of factors."""
    paired = {span for pair in pairs_of(layout) for span in (pair.a, pair.b)}
    return [
        (slot.start, slot.stop)
        for slot in layout.slots
        if any(f".{kind}_" in slot.name for kind in ("lora", "ia3")) and (slot.start, slot.stop) not in paired
    ]
