"""The server's models of a run, whatever the method, and all that is needed to use them for a new client."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fedmerge.core.errors import FedmergeError, UsageError
from fedmerge.core.protocol import SERVER_MODELS, own_name, state_tensors
from fedmerge.core.ranges import Ranges, gathered, woven
from fedmerge.core.soup import merge, mixing
from fedmerge.core.tensor_files import read_tensors
from fedmerge.core.vector import Layout, layout_of, twin
from fedmerge.data import FederatedData, FolderOptions
from fedmerge.data.federated import without_examples
from fedmerge.data.form import InputForm
from fedmerge.experiment.config import Config, config_of
from fedmerge.experiment.execute import Outcome
from fedmerge.experiment.federation import load_data, make_module
from fedmerge.experiment.record import RunRecord, read_run
from fedmerge.experiment.serving import Serving, read_serving, recipe_of, recipe_table, refuse_larger, refuse_other_draw


@dataclass(frozen=True)
class Server:
    """A run as a new client meets it.

    Attributes:
        models: [d, S] the server's models at the selected round; S = P unless clients keep a part.
        rows: [G, N, d] merging weights of the known clients; None for methods without them.
        blocks: [G, 2] range of the vector that shares a row.
        module: The network.
        layout: Of the module.
        serving: Training, options and form of the inputs.
        record: Of the run.
        label_column: Of the run's own tables, if it had any.
        text_column: Of the run's own tables, if they held texts.
        recipe: What makes the network, for as many classes as a new client has; None where only this module is there.
        kept: Ranges of the whole vector that a new client brings itself: its output layer, or nothing.
        mean_row: [G, d] mean merging weights of the known clients, where their own are not told.
    """

    models: Float[Tensor, "d P"]
    rows: Float[Tensor, "G N d"] | None
    blocks: Int[Tensor, "G 2"]
    module: nn.Module
    layout: Layout
    serving: Serving
    record: RunRecord
    label_column: str = "label"
    text_column: str | None = None
    recipe: Any = None
    kept: Ranges = ()
    mean_row: Float[Tensor, "G d"] | None = None

    @property
    def num_classes(self) -> int:
        """K of the network."""
        return len(self.record.class_names)

    def for_classes(self, names: tuple[str, ...]) -> Server:
        """The server for a client that brings its own output layer, with these classes.

        Raises:
            UsageError: if the classes are not the run's and there is no recipe that could make another output layer.
        """
        record = replace(self.record, class_names=names)
        if names == self.record.class_names:
            return self
        refusal = UsageError(
            f"this client's classes are {', '.join(names)}; the run's network has an output layer for "
            f"{', '.join(self.record.class_names)} only; give the run a name as its model, or a function of num_classes"
        )
        if self.recipe is None:
            raise refusal
        module = make_module(self.recipe, _shapes(self.serving.form, record), record.seed, dtype=self.dtype)
        _keep_frozen_draw(self.module, module)
        options = self.serving.options
        layout = layout_of(module, head=options.head, frozen=options.frozen)
        if layout.head_bias is None or layout.head_bias[1] - layout.head_bias[0] != len(names):
            raise refusal
        return replace(self, record=record, module=module, layout=layout, kept=(layout.head,))

    @property
    def dtype(self) -> torch.dtype:
        """Of inputs and parameters."""
        return self.serving.options.dtype

    @property
    def uniform(self) -> Float[Tensor, "G d"]:
        """The row that weighs all models alike."""
        d = len(self.models)
        return torch.full((len(self.blocks), d), 1 / d, dtype=torch.float64)

    def merged(self, rows: Float[Tensor, "R G d"]) -> Float[Tensor, "R P"]:
        """One model per row: θ = Σ_j a_j Θ_j, block by block; gradients flow through the rows.

        Where the client brings its output layer, the network's fresh one is in its place.
        """
        found = merged(self.models, rows, self.blocks)
        if not self.kept:
            return found
        own = gathered(self.layout.read(self.module), self.kept)
        return torch.stack([woven(own, vector, self.kept) for vector in found])

    def module_of(self, params: Float[Tensor, " P"]) -> nn.Module:
        """A network with these parameters, in evaluation mode."""
        module = twin(self.module)
        self.layout.write(params, module)
        return module.eval()


def _keep_frozen_draw(known: nn.Module, module: nn.Module) -> None:
    """Gives a network with another output layer the frozen factors A that the run's models were trained with."""
    drawn = {name: p for name, p in known.named_parameters() if ".lora_A." in name and not p.requires_grad}
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name in drawn:
                parameter.copy_(drawn[name])


def merged(
    models: Float[Tensor, "d P"], rows: Float[Tensor, "R G d"], blocks: Int[Tensor, "G 2"]
) -> Float[Tensor, "R P"]:
    """One model [P] per row: θ = Σ_j a_j Θ_j, block by block."""
    return torch.cat([merge(models[:, a:b], rows[:, g]) for g, (a, b) in enumerate(blocks.tolist())], dim=1)


def server_of_outcome(outcome: Outcome) -> Server:
    """The server of a run that is in memory.

    Raises:
        UsageError: if its method keeps no whole models on the server.
    """
    setup = outcome.setup
    serving = Serving(recipe_table(outcome.model), setup.training, setup.options, setup.data.form)
    kept = _kept_head(serving, setup.layout)
    tensors = state_tensors(outcome.selected.state)
    tensors = {own_name(name): tensor for name, tensor in tensors.items()}
    found = _server(tensors, setup.module, setup.layout, serving, outcome.record)
    recipe = None if isinstance(outcome.model, nn.Module) else outcome.model
    return replace(found, recipe=recipe, kept=kept)


def server_of_folder(folder: Path, model: Any = None) -> Server:
    """The server of a run folder, at the round that validation selected.

    Args:
        folder: That a run wrote.
        model: The network again (recipe, module or function), for runs whose folder does not name it.

    Raises:
        UsageError: if the method keeps no whole models on the server; if the network must be given and is not, or is
            another one.
        FedmergeError: if the folder is no run, is not finished or damaged.
    """
    record = read_run(folder)
    path = folder / "models.safetensors"
    if not path.is_file():
        raise FedmergeError(f"{folder} has no models.safetensors (its run is {record.status}); give a finished run")
    try:
        tensors = read_tensors(path)
    except FedmergeError as error:
        raise FedmergeError(f"{error}; the run cannot be used, make it again") from error
    state = {name.removeprefix("server."): tensor for name, tensor in tensors.items() if name.startswith("server.")}
    state = {own_name(name): tensor for name, tensor in state.items()}
    _refuse_without_models(state, record)
    config = config_of(folder)
    serving = _serving_of(folder, config)
    network = network_of(record, serving, folder, model)
    own = config.source if config and isinstance(config.source, FolderOptions) else FolderOptions(path="")
    refuse_damaged(state, record, path, network.size)
    found = _server(state, network.module, network.layout, serving, record)
    return replace(
        found,
        label_column=own.label_column,
        text_column=own.text_column,
        recipe=network.recipe,
        kept=network.kept,
    )


class Network(NamedTuple):
    """A run's network, made again.

    Attributes:
        module: With the weights of draw 0.
        layout: Of the module.
        recipe: What makes it; None where only this module is there.
        kept: Ranges of the whole vector that a new client brings itself.
    """

    module: nn.Module
    layout: Layout
    recipe: Any
    kept: Ranges

    @property
    def size(self) -> int:
        """S, numbers of a server model."""
        return self.layout.num_params - sum(stop - start for start, stop in self.kept)


def network_of(record: RunRecord, serving: Serving, folder: Path, model: Any = None) -> Network:
    """The network of a run folder, or of another folder with the run's ``models.safetensors``.

    Args:
        record: Of the run.
        serving: Names the network.
        folder: With its tensors.
        model: The network again (recipe, module or function), where the folder does not name it.

    Raises:
        UsageError: if the network must be given and is not, or is another one.
        FedmergeError: if the folder is damaged.
    """
    shapes = _shapes(serving.form, record)
    if model is None:
        refuse_larger(serving, shapes.input_shape, shapes.num_classes, record.num_params, folder)
    recipe = model if model is not None else recipe_of(serving, folder)
    module = make_module(recipe, shapes, record.seed, dtype=serving.options.dtype)
    refuse_other_draw(serving, module, folder)
    layout = layout_of(module, head=serving.options.head, frozen=serving.options.frozen)
    kept = _kept_head(serving, layout)
    if layout.num_params != record.num_params:
        raise UsageError(
            f"model: got a {type(module).__name__} of {layout.num_params} parameters; the run's network has "
            f"{record.num_params}. Give the network that the run was made with"
        )
    return Network(module, layout, None if isinstance(recipe, nn.Module) else recipe, kept)


def _refuse_without_models(state: Mapping[str, Tensor], record: RunRecord) -> None:
    if not any(name in state for name in SERVER_MODELS):
        raise UsageError(
            f"method {record.method!r} keeps no whole models on the server, so there is nothing to start a new client "
            "from; give a run of fedmerge, fedavg, ifca or another method with server models"
        )


def _kept_head(serving: Serving, layout: Layout) -> Ranges:
    """What a new client must bring itself: the output layer, if the run's clients keep it.

    Raises:
        UsageError: if they keep anything else, or an output layer that is not linear.
    """
    names = serving.options.keep
    if not names:
        return ()
    if layout.below(names) != (layout.head,) or layout.head_bias is None:
        raise UsageError(
            f"the clients of this run keep {', '.join(names)} (run option `keep`), which a new client does not have; "
            'only a linear output layer can be fitted anew: give a run with keep=["head"] or without `keep`'
        )
    return (layout.head,)


def refuse_damaged(state: Mapping[str, Tensor], record: RunRecord, path: Path, size: int) -> None:
    """Tensors that a whole file can hold and no run writes.

    Raises:
        FedmergeError: naming the tensor.
    """
    name = next(name for name in SERVER_MODELS if name in state)
    models = state[name]
    fits = models.dim() == 2 and len(models) > 0 and models.shape[1] == size
    if not fits or not models.is_floating_point():
        raise _damaged(path, name, models, f"floats [models, {size}]")
    if not models.isfinite().all():
        raise _damaged(path, name, models, "finite numbers only")
    logits = state.get("soup.logits")
    if logits is None:
        return
    expected = (len(record.client_names), len(models))
    if logits.dim() != 3 or tuple(logits.shape[1:]) != expected or not logits.is_floating_point():
        raise _damaged(path, "soup.logits", logits, f"floats [groups of layers, {expected[0]}, {expected[1]}]")
    if logits.isnan().any():
        raise _damaged(path, "soup.logits", logits, "numbers only")
    _refuse_damaged_blocks(state.get("blocks", torch.tensor([[0, size]])), path, size, len(logits))


def _refuse_damaged_blocks(blocks: Tensor, path: Path, size: int, count: int) -> None:
    """Ranges that share a row of weights must be one after another, from the vector's first number to its last."""
    whole = blocks.dtype == torch.int64 and tuple(blocks.shape) == (count, 2)
    ends = [0, *blocks[:, 1].tolist()] if whole else []
    if not whole or blocks[:, 0].tolist() != ends[:-1] or ends != sorted(ends) or ends[-1] != size:
        raise _damaged(path, "blocks", blocks, f"{count} ranges one after another, from 0 to {size}")


def _damaged(path: Path, name: str, tensor: Tensor, expected: str) -> FedmergeError:
    kind = str(tensor.dtype).removeprefix("torch.")
    return FedmergeError(
        f"{path} is damaged: {name} is {kind} {list(tensor.shape)}; expected {expected}; the run cannot be used, make "
        "it again"
    )


def _server(
    state: Mapping[str, Tensor],
    module: nn.Module,
    layout: Layout,
    serving: Serving,
    record: RunRecord,
) -> Server:
    _refuse_without_models(state, record)
    models = next(state[name] for name in SERVER_MODELS if name in state)
    blocks = state.get("blocks", torch.tensor([[0, models.shape[1]]]))
    rows: Tensor | None = None
    if "soup.logits" in state:
        rows = mixing(state["soup.logits"])
    elif (weights := record.selected().mixing) is not None and len(weights[0]) == len(models):
        given = torch.tensor(weights, dtype=torch.float64)
        rows = (given / given.sum(dim=1, keepdim=True))[None]  # the record rounds them
    return Server(models, rows, blocks, module, layout, serving, record)


def _serving_of(folder: Path, config: Config | None) -> Serving:
    """From ``serving.json``; from the configuration and its data for folders that are older than that file."""
    serving = read_serving(folder)
    if serving is not None:
        return serving
    if config is None:
        raise UsageError(
            f"{folder} has neither serving.json nor config.toml, which say how its inputs are scaled; make the run "
            "again, or give the Run object itself in Python"
        )
    form = load_data(config.source, config.partition, config.run.seed, config.model).form
    return Serving(recipe_table(config.model), config.training, config.run, form)


def _shapes(form: InputForm | None, record: RunRecord) -> FederatedData:
    """A federation of one client without examples, for what a recipe needs to know."""
    return without_examples(["nobody"], record.class_names, form)
