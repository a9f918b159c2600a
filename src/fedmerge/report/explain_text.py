"""An explanation in plain words and tables, for the page and the terminal alike."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from fedmerge.experiment.record import RunRecord
from fedmerge.report.classes import STANDS_OUT, Classes, ClassShare, classes_of, counted
from fedmerge.report.explain import (
    MOST,
    ClientUse,
    Explanation,
    Group,
    ModelUse,
    Weight,
    client_use,
    effective_models,
    near_equal_models,
    undecided_clients,
    unused_models,
)
from fedmerge.report.kinds import known_tasks, other_groups
from fedmerge.report.likeness import TOGETHER
from fedmerge.report.markup import shorten
from fedmerge.report.table import Cell, Column, Table
from fedmerge.report.text import NOTHING, listed, percent, plural, points

MEMBERS = 8  # members of a group that a sentence names
GROUPS = 12  # groups that get a sentence of their own
WEIGHT_COLUMNS = 8  # more models than this are not written out client by client
LONGEST = 24  # characters of a name


def whole_percent(value: float) -> str:
    """A share without decimals: 0.834 -> 83 %."""
    return f"{100 * value:.0f} %"


def model_words(models: Sequence[Weight]) -> str:
    """Models with their weights: ``model 2 (83 %) and model 0 (12 %)``; others where much is left."""
    return listed([*(f"model {model} ({whole_percent(weight)})" for model, weight in models), *_others(models)])


def _others(models: Sequence[Weight]) -> list[str]:
    """A word for the models that are not named, if they carry a quarter of the weight or more."""
    return ["others"] if math.fsum(weight for _, weight in models) <= 0.75 else []


def group_sentences(explanation: Explanation) -> tuple[str, ...]:
    """One sentence for each of the largest groups, in the order of the tree; then the clients that stand alone."""
    groups = explanation.groups
    if len(groups) == 1 and len(groups[0].members) > 1:
        return (_single_group(explanation),)
    crowds = sorted((group for group in groups if len(group.members) > 1), key=lambda group: -len(group.members))
    named = sorted(crowds[:GROUPS], key=groups.index)
    said = [_group_sentence(explanation, group) for group in named]
    if len(crowds) > GROUPS:
        rest = sum(len(group.members) for group in crowds[GROUPS:])
        said.append(f"{plural(rest, 'client')} in {plural(len(crowds) - GROUPS, 'smaller group')}.")
    alone = [group.members[0] for group in groups if len(group.members) == 1]
    if alone:
        verb = "shares" if len(alone) == 1 else "share"
        said.append(f"{_few(explanation, alone)} {verb} less than half of the weight with any group.")
    return tuple(said)


def _single_group(explanation: Explanation) -> str:
    clients, models = len(explanation.mixing), explanation.mixing.shape[1]
    if models == 1:
        return f"One model serves all {clients} clients alike: there are no groups to tell apart."
    common = model_words(explanation.groups[0].models)
    return f"All {clients} clients are one group: they share at least half of their weight, mostly {common}."


def _group_sentence(explanation: Explanation, group: Group) -> str:
    share = model_words(group.models)
    tasks = f" Tasks: {_counts(group.tasks)}." if group.tasks is not None else ""
    true = f" True groups: {_true_counts(group)}." if other_groups(explanation.run) is not None else ""
    return f"Group {group.name}: {_few(explanation, group.members)} share {share}.{tasks}{true}"


def _true_counts(group: Group) -> str:
    return _counts([(f"group {true}", count) for true, count in group.true_groups or ()])


def _counts(found: Sequence[tuple[str, int]]) -> str:
    """The commonest of what members are, with how many are: ``4 of spam and 1 of topic``."""
    counts = [f"{count} of {name}" for name, count in found[:MOST]]
    more = len(found) - len(counts)
    return listed([*counts, f"{more} more"] if more else counts)


def _few(explanation: Explanation, clients: Sequence[int]) -> str:
    """Up to eight names in the clients' order; of more, five and a count."""
    names = _names(explanation, sorted(clients))
    return listed(names if len(names) <= MEMBERS else [*names[:5], f"{len(names) - 5} more"])


def _names(explanation: Explanation, clients: Iterable[int]) -> list[str]:
    return [shorten(explanation.run.client_names[client], LONGEST) for client in clients]


def remarks(explanation: Explanation) -> tuple[str, ...]:
    """How many models a client uses, and what a reader should look at: unused, equal and undecided ones."""
    mixing = explanation.mixing
    models = mixing.shape[1]
    effective = effective_models(mixing)
    said = []
    if models > 1:
        span = f"from {effective.min():.1f} to {effective.max():.1f}"
        said.append(
            f"A client uses {effective.mean():.1f} of {models} models on average, {span} "
            "(the exponential of its weights' entropy)."
        )
    unused = [str(model) for model in unused_models(mixing)]
    if unused:
        said.append(f"{_models(unused)} {'is' if len(unused) == 1 else 'are'} unused: no client gives 5 % to it.")
    for equal in near_equal_models(mixing):
        names = _models([str(model) for model in equal])
        said.append(f"{names} are used by the same clients in the same ratio: one model could take their place.")
    undecided = undecided_clients(mixing)
    if undecided:
        verb = "uses" if len(undecided) == 1 else "use"
        said.append(f"{_few(explanation, undecided)} {verb} {_all(models)} nearly alike.")
    return tuple(said)


def _all(models: int) -> str:
    return "both models" if models == 2 else f"all {models} models"


def _models(names: Sequence[str]) -> str:
    return f"Model{'' if len(names) == 1 else 's'} {listed(names)}"


# Clients


def client_phrase(explanation: Explanation, use: ClientUse) -> str:
    """What follows a client's name: ``uses model 2 (83 %) with site-01 and site-04``."""
    row = explanation.mixing[[use.client]]
    used = f"{_all(row.shape[1])} nearly alike" if undecided_clients(row) else model_words(use.models)
    others = _names(explanation, (other for other, share in use.nearest if share >= TOGETHER))
    return f"uses {used} with {listed(others)}" if others else f"uses {used} and is like no other client"


def client_sentence(explanation: Explanation, client: int) -> str:
    """Everything about one client in a sentence or two."""
    use = client_use(explanation, client)
    name = explanation.run.client_names[client]
    tasks = known_tasks(explanation.run)
    task = "" if tasks is None else f"task {tasks[client]}, "
    said = f"{name} {client_phrase(explanation, use)}; {task}group {use.group}, {use.effective:.1f} models in effect."
    if not math.isnan(use.accuracy):
        said += f" Test accuracy {percent(use.accuracy)} %"
        said += "." if math.isnan(use.gain) else f", {points(use.gain)} points to training alone."
    return said


def client_table(explanation: Explanation, most: int | None = None) -> Table:
    """A row per client in the order of likeness, at most `most` of them."""
    shown = explanation.likeness.order[:most]
    uses = [client_use(explanation, client) for client in shown]
    models = explanation.mixing.shape[1]
    run, tasks, groups = explanation.run, known_tasks(explanation.run), other_groups(explanation.run)
    columns = (
        Column("Client", "text"),
        *((Column("Task", "text"),) if tasks is not None else ()),
        Column("Found", "text", "the group that its weights put it in"),
        *((Column("True group", "whole"),) if groups is not None else ()),
        Column("In words", "text", "models of a tenth or more; up to three clients that share half of the weight"),
        Column("Effective models", "ratio", "exponential of the entropy of its weights"),
        Column("Test (%)", "percent", "accuracy"),
        *((Column("To Local (points)", "points", "against training alone"),) if explanation.local is not None else ()),
        *(Column(f"Model {model}", "share") for model in range(models) if 1 < models <= WEIGHT_COLUMNS),
    )
    rows: list[tuple[Cell, ...]] = [
        (
            run.client_names[use.client],
            *((tasks[use.client],) if tasks is not None else ()),
            use.group,
            *((groups[use.client],) if groups is not None else ()),
            client_phrase(explanation, use),
            use.effective,
            use.accuracy,
            *((use.gain,) if explanation.local is not None else ()),
            *map(float, explanation.mixing[use.client] if 1 < models <= WEIGHT_COLUMNS else ()),
        )
        for use in uses
    ]
    return Table(columns, tuple(rows), "What every client uses")


# Models and groups


def group_table(explanation: Explanation) -> Table:
    """A row per group, in the order of the tree."""
    known, tasks = other_groups(explanation.run) is not None, known_tasks(explanation.run) is not None
    columns = (
        Column("Group", "text"),
        Column("Clients", "whole"),
        Column("Shared models", "text", "mean weights of a tenth or more"),
        *((Column("Tasks", "text", "members of each"),) if tasks else ()),
        *((Column("True groups", "text", "members of each"),) if known else ()),
        Column("Members", "text"),
        Column("Test (%)", "percent", "accuracy, mean over members"),
    )
    rows: list[tuple[Cell, ...]] = [
        (
            group.name,
            len(group.members),
            _brief(group.models),
            *((_counts(group.tasks),) if group.tasks is not None else ()),
            *((_true_counts(group),) if known else ()),
            _few(explanation, group.members),
            group.accuracy,
        )
        for group in explanation.groups
    ]
    return Table(columns, tuple(rows), f"Groups found: {_who(explanation)}")


def _brief(models: Sequence[Weight]) -> str:
    return ", ".join([*(f"{model} ({whole_percent(weight)})" for model, weight in models), *_others(models)])


def _who(explanation: Explanation) -> str:
    run = explanation.run
    return f"{run.label}, seed {run.seed}, round {run.selected().round}"


def model_table(explanation: Explanation) -> Table:
    """A row per model: how much it is used, by whom, for which tasks and classes and how well."""
    run = explanation.run
    known, classes = other_groups(run) is not None, classes_of(run)
    columns = (
        Column("Model", "text"),
        Column("Use (%)", "percent", "share of all clients' weight"),
        Column("Heaviest of", "whole", "clients that give no model more weight"),
        *((Column("Tasks", "text", "their shares of the model's weight"),) if known_tasks(run) is not None else ()),
        Column("Heaviest users", "text", "up to three clients and the weight they give it, of a tenth or more"),
        *((_classes_column(run, classes),) if classes is not None else ()),
        *((Column("True groups", "text", "their shares of the model's weight"),) if known else ()),
        Column("Test (%)", "percent", "accuracy of its users, each counting with its weight"),
    )
    rows: list[tuple[Cell, ...]] = [
        (
            f"{use.model}",
            use.share,
            use.heaviest_of,
            *((_composition(use.tasks),) if use.tasks is not None else ()),
            _users(explanation, use),
            *((_classes(run, use.classes),) if use.classes is not None else ()),
            *((_composition(use.true_groups),) if known and use.true_groups is not None else ()),
            use.accuracy,
        )
        for use in explanation.models
    ]
    notes = () if run.class_counts is not None else (_NO_CLASSES,)
    return Table(columns, tuple(rows), f"What each model is for: {_who(explanation)}", notes)


_NO_CLASSES = (
    "Which classes a model serves is unknown: this run was written before class counts were kept; "
    "run it again to see them."
)


def _classes_column(run: RunRecord, classes: Classes) -> Column:
    among = " within their task" if classes.tasks else ""
    meaning = (
        f"at least {STANDS_OUT:g} times as frequent among its users' train {counted(run)} as in the federation{among}, "
        "and by more than three standard errors of as many drawn by chance"
    )
    return Column("Classes that stand out", "text", meaning)


def _users(explanation: Explanation, use: ModelUse) -> str:
    names = _names(explanation, (client for client, _ in use.clients))
    shares = (whole_percent(weight) for _, weight in use.clients)
    return ", ".join(f"{name} ({share})" for name, share in zip(names, shares, strict=True)) or NOTHING


def _classes(run: RunRecord, found: Sequence[ClassShare]) -> str:
    named = [f"{shorten(run.class_names[k], LONGEST)} ({times:.1f} ×)" for k, _, times in found[:MOST]]
    more = len(found) - len(named)
    return ", ".join([*named, f"{more} more"] if more else named) or NOTHING


def _composition(shares: Sequence[tuple[int | str, float]]) -> str:
    """Tasks or true groups that hold a twentieth of the model's weight or more."""
    named = [f"{shorten(str(name), LONGEST)} ({whole_percent(share)})" for name, share in shares if share >= 0.05]
    shown = named[:MOST]
    return ", ".join([*shown, f"{len(named) - MOST} more"] if len(named) > MOST else shown) or NOTHING


def gain_sentence(explanation: Explanation) -> str:
    """How clients fare against training alone; empty without a Local-only run."""
    if explanation.local is None:
        return ""
    gains = explanation.accuracy - explanation.local
    known = gains[~np.isnan(gains)]
    if not len(known):
        return ""
    better, worse, equal = (int(side.sum()) for side in (known > 0, known < 0, known == 0))
    counts = f"{better:,} better, {worse:,} worse, {equal:,} equal"
    return f"Of {plural(len(known), 'client')}, against training alone: {counts}."
