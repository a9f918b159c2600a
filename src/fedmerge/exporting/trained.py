"""A finished run, in memory or read back from its folder, and the model that each of its clients would deploy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from fedmerge.core.defences import Defences, unguarded
from fedmerge.core.ensemble import Personal, members
from fedmerge.core.errors import FedmergeError, UsageError
from fedmerge.core.protocol import Batch, Batches, state_tensors, take, with_tensors
from fedmerge.core.tensor_files import read_tensors
from fedmerge.data import FederatedData
from fedmerge.data.federated import without_examples
from fedmerge.experiment.checkpoint import restored_fleet
from fedmerge.experiment.choice import objective_of
from fedmerge.experiment.config import config_of
from fedmerge.experiment.elsewhere import setup_without_examples
from fedmerge.experiment.execute import Outcome
from fedmerge.experiment.federation import (
    channels_last,
    in_precision,
    load_data,
)
from fedmerge.experiment.record import RunRecord, read_run
from fedmerge.experiment.serving import (
    Serving,
    method_of,
    read_serving,
    recipe_of,
    recipe_table,
    refuse_larger,
    refuse_other_draw,
)
from fedmerge.experiment.simulation import Progress, Setup, models_now, one_thread, played_method
from fedmerge.runtime import first_fleet


@dataclass(frozen=True)
class Trained:
    """A run at the round that validation selected.

    Attributes:
        record: What was measured.
        serving: Training, options and form of the inputs.
        recipe: Recipe, module or function that the run was given.
        setup: What it ran on; of a run folder its clients have names and no examples.
        progress: Its state.
        folder: Of a run that was read back.
    """

    record: RunRecord
    serving: Serving
    recipe: Any
    setup: Setup
    progress: Progress
    folder: Path | None = None

    @property
    def module(self) -> nn.Module:
        """The network, with the weights of draw 0."""
        return self.setup.module

    @property
    def input_shape(self) -> tuple[int, ...] | None:
        """Of one input; None for a folder that does not say."""
        if self.serving.form is not None:
            return self.serving.form.shape
        return self.setup.data.input_shape if self.folder is None else None

    def personal(self, index: int) -> Personal:
        """The model that one client would use.

        Raises:
            UsageError: if the method makes it from the client's examples and the folder does not say where they are.
            FedmergeError: if the folder is damaged or its data changed.
        """
        with one_thread():
            if self.folder is None:
                return models_now(self.setup, self.progress)[index]
            try:
                found = self._without_examples(index)
            except _NeedsExamples:
                found = models_now(_with_examples(self.setup, self.record, self.folder), self.progress)[index]
            except (RuntimeError, IndexError, ValueError, TypeError) as error:  # tensors that do not fit each other
                raise _damaged(self.folder, f"models.safetensors: {_first_line(error)}") from error
        if any(len(vector) != self.record.num_params or not vector.isfinite().all() for vector in members(found)):
            raise _damaged(self.folder, "a client's model is not finite, or not as long as its network")
        return found

    def _without_examples(self, index: int) -> Personal:
        played, fleet = self.setup.played, self.progress.fleet
        if fleet.policy == "recalibrate" and len(fleet.buffers[0]):
            raise _NeedsExamples
        down = take(played.send(self.progress.state, torch.arange(len(fleet.private))), index)

        def personal(task: Any) -> Personal:
            own = fleet.rules.own_task(task, fleet.buffers[index])
            return played.personal(down, fleet.private[index], _one_pass_without_examples(), own or task)

        (model,) = self.setup.engine.map(personal, [()])
        return fleet.own_buffers(model, index)


class _NeedsExamples(Exception):  # noqa: N818 - never leaves this file
    """A method asked for the client's examples."""


class _Missing(Tensor):
    """Stands for a client's examples where they are not at hand: whatever is done with it, it says so."""

    @classmethod
    def __torch_function__(cls, *_: Any) -> NoReturn:
        raise _NeedsExamples


def _one_pass_without_examples() -> Batches:
    missing = torch.empty(0).as_subclass(_Missing)
    return (Batch(missing, missing, missing, missing),)


def trained_of_outcome(outcome: Outcome) -> Trained:
    """A run that is in memory."""
    setup = outcome.setup
    serving = Serving(recipe_table(outcome.model), setup.training, setup.options, setup.data.form)
    return Trained(outcome.record, serving, outcome.model, setup, outcome.selected)


def trained_of_folder(folder: Path, model: Any = None) -> Trained:
    """A run that left a folder.

    Args:
        folder: That the run wrote.
        model: The network again (recipe, module or function), for runs whose folder does not name it.

    Raises:
        UsageError: if the network must be given and is not, or is another one.
        FedmergeError: if the folder is no run, not of a finished run, or damaged.
    """
    record = read_run(folder)
    if record.status != "finished":
        raise FedmergeError(f"{folder}: this run is {record.status}; give a finished one")
    serving = read_serving(folder)
    if serving is None:
        raise FedmergeError(f"{folder} has no serving.json, which names its network; make the run again")
    tensors = _tensors(folder / "models.safetensors", folder)
    if model is None:
        data = _nameless(record, serving)
        refuse_larger(serving, data.input_shape, data.num_classes, record.num_params, folder)
    recipe = model if model is not None else recipe_of(serving, folder)
    setup = _setup(record, serving, recipe)
    refuse_other_draw(serving, setup.module, folder)
    if setup.layout.num_params != record.num_params:
        raise UsageError(
            f"model: got a {type(setup.module).__name__} of {setup.layout.num_params} parameters; the run's network "
            f"has {record.num_params}. Give the network that the run was made with"
        )
    return Trained(record, serving, recipe, setup, _progress(setup, tensors, record, folder), folder)


def _setup(record: RunRecord, serving: Serving, recipe: Any) -> Setup:
    """As the run had it, but for the clients' examples and the defences: no replies come any more."""
    options, data = serving.options, _nameless(record, serving)
    setup = setup_without_examples(method_of(record), recipe, serving.training, options, data, record.engine)
    undefended = replace(options, defences=Defences(clip=0, max_count=0))
    return replace(setup, played=played_method(setup.algorithm, setup.layout, undefended))


def _nameless(record: RunRecord, serving: Serving) -> FederatedData:
    """The run's clients without their examples."""
    data = without_examples(record.client_names, record.class_names, serving.form)
    return replace(data, groups=record.groups)


def _tensors(path: Path, folder: Path) -> dict[str, Tensor]:
    try:
        return read_tensors(path, name=path.name)
    except FedmergeError as error:
        raise FedmergeError(f"{folder}: {error}; the run cannot be used, make it again") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _damaged(folder: Path | None, why: str) -> FedmergeError:
    return FedmergeError(f"{folder} is damaged: {why}; the run cannot be used, make it again")


def _progress(setup: Setup, tensors: Mapping[str, Tensor], record: RunRecord, folder: Path) -> Progress:
    """State and clients as `experiment.store.write_models` wrote them."""
    start, T, policy = setup.layout.read(setup.module), setup.layout.num_trainable, setup.options.buffers
    template = setup.played.init(lambda _: start, setup.facts, record.seed)
    server = {name.removeprefix("server."): value for name, value in tensors.items() if name.startswith("server.")}
    try:
        state = with_tensors(template, unguarded(server))
        fleet = restored_fleet(first_fleet(setup.played, start, len(record.client_names), T, policy), tensors)
    except (FedmergeError, KeyError, ValueError, TypeError) as error:
        raise _damaged(folder, f"models.safetensors: {_first_line(error)}") from error
    _refuse_misfits(state, setup, record, folder)
    return Progress(state, fleet, record.selected().round)


def _refuse_misfits(state: Any, setup: Setup, record: RunRecord, folder: Path) -> None:
    """Tensors that a whole file can hold and no run writes: the state must be able to serve every client."""
    try:
        weights = setup.played.mixing(state)
        setup.played.send(state, torch.arange(len(record.client_names)))
    except (RuntimeError, IndexError, ValueError, TypeError) as error:
        raise _damaged(folder, f"models.safetensors: {_first_line(error)}") from error
    broken = [name for name, tensor in state_tensors(state).items() if name.endswith("models") and tensor.isnan().any()]
    if broken or (weights is not None and len(weights) != len(record.client_names)):
        raise _damaged(folder, f"models.safetensors: {', '.join(broken) or 'merging weights of other clients'}")


def _with_examples(setup: Setup, record: RunRecord, folder: Path) -> Setup:
    """The setup with the clients' examples, loaded as the run's configuration says."""
    config = config_of(folder)
    if config is None:
        raise UsageError(
            f"method {record.method!r} makes a client's model from its examples, which {folder} does not name; give "
            "the Run object itself in Python"
        )
    raw = load_data(config.source, config.partition, config.run.seed, config.model)
    if raw.sha256() != record.data_sha256:
        raise FedmergeError(f"{folder}: the data that config.toml names are no longer those of the run; make it again")
    data = channels_last(in_precision(raw, setup.options.dtype))
    descent = setup.training.descent()
    engine = setup.choice.engine(setup.module, setup.layout, descent, objective_of(data))
    return replace(setup, data=data, engine=engine)
