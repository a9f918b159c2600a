"""A client's whole network as one file: ONNX, or PyTorch's own tensors by name."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fedmerge.core.errors import FedmergeError, UsageError
from fedmerge.core.randomness import generator
from fedmerge.data.form import TOKENS
from fedmerge.exporting.client import Client
from fedmerge.exporting.files import write_tensors
from fedmerge.models._adapted import Adapted

TOLERANCE = 1e-5
"""Largest difference of an exported network's outputs, relative to the largest output."""


def write_torch(client: Client, folder: Path) -> nn.Module:
    """``model.safetensors``: every tensor of the network's ``state_dict``.

    Raises:
        UsageError: for pretrained models and for clients that use several networks.
    """
    module = _small(client)
    if not isinstance(client.personal, Tensor):
        raise UsageError(
            f"clients of method {client.trained.record.method!r} use several networks at once, whose tensors alone say "
            "nothing of how outputs are combined; take kind 'onnx'"
        )
    write_tensors(folder / "model.safetensors", module.state_dict())
    return module


def write_onnx(client: Client, folder: Path) -> tuple[nn.Module, float]:
    """``model.onnx`` from ``inputs`` [batch, ...] to ``outputs`` [batch, classes], in float32.

    Returns:
        The network, and the largest difference of the file's outputs from it on three random inputs.

    Raises:
        FedmergeError: without the libraries of the extra, or if the file's outputs are not the network's.
        UsageError: for pretrained models, and networks that cannot be traced or whose input is not known.
    """
    _require_onnx()
    module, path = _small(client).float(), folder / "model.onnx"
    shape = client.trained.input_shape
    if shape is None:
        raise UsageError("this run's folder does not say what an input looks like; give the Run object in Python")
    try:
        _trace(module, _inputs(client, shape, count=2), path)
    except Exception as error:  # whatever the exporter says of a user's module
        reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        raise UsageError(f"{type(module).__name__} cannot be exported to ONNX: {reason}") from error
    return module, _checked(path, module, _inputs(client, shape, count=3))


def _trace(module: nn.Module, sample: Tensor, path: Path) -> None:
    """Writes the file; the first axis of inputs and outputs may be of any length."""
    with _quiet_exporter():
        torch.onnx.export(
            module,
            (sample,),
            path,
            input_names=["inputs"],
            output_names=["outputs"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            external_data=False,
            verbose=False,
        )


def _small(client: Client) -> nn.Module:
    if isinstance(client.trained.module, Adapted):
        raise UsageError(
            "this run's network is a pretrained model; take kind 'peft', 'merged' or 'mergekit', "
            "which transformers and others load"
        )
    return client.module()


def _require_onnx() -> None:
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise FedmergeError(
            f"kind 'onnx' needs {' and '.join(missing)}, which is not installed: pip install \"fedmerge[onnx]\""
        )


def _inputs(client: Client, shape: tuple[int, ...], count: int) -> Tensor:
    """Random inputs; zeros for a network that reads tokens."""
    form = client.trained.serving.form
    if form is not None and form.dtype == TOKENS:
        return torch.zeros(count, *shape, dtype=torch.int64)
    drawn = generator(client.trained.record.seed, f"inputs of {count} to try").normal(size=(count, *shape))
    return torch.from_numpy(drawn.astype(np.float32))


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Within the block the exporter neither warns of its own parts nor of libraries that it does not find."""
    log = logging.getLogger("torch.onnx")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)


@torch.no_grad()
def _checked(path: Path, module: nn.Module, inputs: Tensor) -> float:
    """The largest difference of outputs.

    Raises:
        FedmergeError: if it is more than rounding.
    """
    from onnx.reference import ReferenceEvaluator  # noqa: PLC0415 - optional extra

    wanted = module(inputs)
    (outputs,) = ReferenceEvaluator(str(path)).run(None, {"inputs": inputs.numpy()})
    found = torch.from_numpy(np.asarray(outputs))
    off = float((found - wanted).abs().max()) if found.shape == wanted.shape else float("inf")
    if not off <= TOLERANCE * max(1.0, float(wanted.abs().max())):
        raise FedmergeError(
            f"the ONNX file of {type(module).__name__} gives other outputs than the network (off by {off:.1e}); take "
            "kind 'torch'"
        )
    return off
