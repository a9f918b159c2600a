"""One self-contained page about a set of runs: it needs no network and no script, and may be sent by mail."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from fedmerge.core.errors import UsageError
from fedmerge.core.files import write_atomically
from fedmerge.experiment.record import RunRecord
from fedmerge.report import parts
from fedmerge.report.attendance import study_attendance
from fedmerge.report.averaging import averaging_errors
from fedmerge.report.document import document
from fedmerge.report.explain import explained
from fedmerge.report.explain_figures import class_map, dendrogram, likeness_map, model_use
from fedmerge.report.explain_text import client_table, gain_sentence, group_sentences, model_table
from fedmerge.report.explain_text import remarks as remarks_on_weights
from fedmerge.report.figures import distribution, forest, worst_clients
from fedmerge.report.kinds import known_tasks, other_groups
from fedmerge.report.lines import accuracy_by_bytes, accuracy_by_round, decidedness
from fedmerge.report.markup import Markup, element, join
from fedmerge.report.privacy_page import privacy_chapter, public_crowds
from fedmerge.report.public import redacted
from fedmerge.report.samples import samples_table
from fedmerge.report.study import Study, client_accuracies, studies
from fedmerge.report.svg import Figure
from fedmerge.report.table import Column, Table
from fedmerge.report.tables import cost_table, structure_table, study_table
from fedmerge.report.task_table import study_task_table
from fedmerge.report.text import listed, plain_options, plural, ranges
from fedmerge.report.verdict import headline, protocol, remarks
from fedmerge.report.weights import merging_weights, weights_over_rounds

CLIENT_ROWS = 200
EXPLAINED_ROWS = 500
TEXT = 160  # characters of a prompt or a completion


def write_report(
    runs: Sequence[RunRecord], target: Path, *, reference: str | None = None, public: bool = False
) -> Path:
    """Writes the page, which only its owner may read unless it is public.

    Args:
        runs: One or several; several methods, seeds and settings.
        target: The file to write, for example ``report.html``; missing folders are made.
        reference: The label that the others are compared with; by default FedMerge, else the first run's.
        public: Whether to leave out what tells of single clients: merging weights and all that shows them, names,
            groups, and what language models wrote.

    Returns:
        The file.

    Raises:
        UsageError: if the runs cannot stand in one report, see `studies`, or the target is a folder.
    """
    target = Path(target)
    if target.is_dir():
        raise UsageError(f"{target} is a folder; give the file to write, for example {target / 'report.html'}")
    page = report_page(studies(runs, reference=reference), public=public)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, page, private=not public)
    return target


def report_page(found: Sequence[Study], *, public: bool = False) -> str:
    """The whole page as text; a public one without what tells of single clients."""
    title = headline(found[0]) if len(found) == 1 else f"{len(found)} settings"
    sections = [_section(study, index, alone=len(found) == 1, public=public) for index, study in enumerate(found)]
    return document(title, element("main", _opening(found), *sections))


def _opening(found: Sequence[Study]) -> Markup:
    if len(found) == 1:
        study = found[0]
        return element(
            "header",
            element("p", study.setting, class_="kicker"),
            element("h1", _unbroken(headline(study))),
            element("ul", *(element("li", remark) for remark in remarks(study)), class_="remarks"),
        )
    links = [
        element("li", element("a", study.setting, href=f"#s{index}"), element("p", _unbroken(headline(study))))
        for index, study in enumerate(found)
    ]
    methods = dict.fromkeys(label for study in found for label in study.labels)
    return element(
        "header",
        element("p", "fedmerge report", class_="kicker"),
        element("h1", f"{plural(len(methods), 'method')} in {plural(len(found), 'setting')}"),
        element("ol", *links, class_="contents"),
    )


def _section(study: Study, index: int, *, alone: bool, public: bool) -> Markup:
    """One setting, from the verdict to the hashes."""
    opening = None
    if not alone:
        opening = join(
            element("h2", study.setting, class_="setting"),
            element("p", _unbroken(headline(study)), class_="verdict"),
            element("ul", *(element("li", remark) for remark in remarks(study)), class_="remarks"),
        )
    level = "h2" if alone else "h3"
    chapters = _public_chapters(study) if public else _chapters(study)
    shown = [element("section", element(level, title), body) for title, body in chapters.items() if body]
    return element("section", opening, *shown, id=f"s{index}")


def _chapters(study: Study) -> dict[str, Markup]:
    results, measured = _results(study), _measured(study)
    clients = element("div", parts.figure(worst_clients(study)), _clients(study), class_="figures")
    return {
        **results,
        "Client by client": clients,
        "Attendance": join(*(parts.table(table) for table in study_attendance(study))),
        "What the models write": _samples(study),
        "Merging weights": _weights(study),
        "Who shares what, and what each model is for": _explained(study),
        "Privacy": privacy_chapter(study),
        **measured,
    }


def _public_chapters(study: Study) -> dict[str, Markup]:
    """Without what tells of single clients; means of tasks stay."""
    shown, tasks = redacted(study), _tasks(study)
    return {**_results(shown), "Task by task": tasks, "Privacy": public_crowds(study), **_measured(shown)}


def _results(study: Study) -> dict[str, Markup]:
    main = study_table(study)
    return {
        "The numbers": join(parts.table(main, study), parts.legend(main), parts.copies(main)),
        "Task by task": _tasks(study),
        "How far apart": parts.figures(forest(study), distribution(study)),
        "Over the rounds": parts.figures(accuracy_by_round(study), accuracy_by_bytes(study), averaging_errors(study)),
    }


def _measured(study: Study) -> dict[str, Markup]:
    spent = cost_table(study)
    return {
        "Costs": join(parts.table(spent, study), parts.legend(spent)),
        "How it was measured": element("ul", *(element("li", words) for words in protocol(study)), class_="protocol"),
        "Versions and hashes": _provenance(study),
    }


def _tasks(study: Study) -> Markup:
    table = study_task_table(study)
    return Markup("") if table is None else join(parts.table(table, study), parts.copies(table))


def _unbroken(sentence: str) -> str:
    """A number stays on one line with its ±, its % and the word that it belongs to."""
    joined = sentence.replace(" ± ", "\u00a0±\u00a0").replace(" %", "\u00a0%").replace("includes 0", "includes\u00a00")
    return re.sub(r"(model|group) (\d)", "\\1\u00a0\\2", joined)


def _weights(study: Study) -> Markup:
    """Merging weights: the reference's open, those of other methods folded."""
    table = structure_table(study)
    if table is None:
        return Markup("")
    shown = {label: next(iter(runs.values())) for label, runs in study.runs.items()}
    merging = {label: run for label, run in shown.items() if run.selected().mixing is not None}
    first = study.reference if study.reference in merging else next(iter(merging))
    folded = [
        element("details", element("summary", f"The weights of {label}"), parts.figures(*_pictures(run)))
        for label, run in merging.items()
        if label != first
    ]
    return join(
        parts.table(table, study),
        parts.legend(table),
        parts.figures(*_pictures(merging[first]), decidedness(study)),
        *folded,
    )


def _pictures(run: RunRecord) -> tuple[Figure | None, ...]:
    return merging_weights(run), weights_over_rounds(run)


def _explained(study: Study) -> Markup:
    """What the reference's merging weights say about clients and models; nothing without merging weights."""
    found = explained(study)
    if found is None:
        return Markup("")
    run, said = found.run, [*remarks_on_weights(found), gain_sentence(found)]
    models, clients = model_table(found), client_table(found, EXPLAINED_ROWS)
    total = len(found.mixing)
    shown = f"All {total}" if total <= EXPLAINED_ROWS else f"{EXPLAINED_ROWS} of {total:,}"
    return join(
        element("p", f"{run.label}, seed {run.seed}, round {run.selected().round}.", class_="note"),
        element("ul", *(element("li", _unbroken(words)) for words in said if words), class_="remarks"),
        element("p", "Groups found", class_="title"),
        element("ul", *(element("li", _unbroken(words)) for words in group_sentences(found)), class_="protocol"),
        parts.figures(dendrogram(found), likeness_map(found)),
        element("p", "What each model is for", class_="title"),
        parts.table(models),
        parts.legend(models),
        parts.figures(model_use(found), class_map(found)),
        element(
            "div",
            element("p", "Every client's mixture", class_="title"),
            parts.table(clients),
            element("p", f"{shown} clients, like ones side by side; a browser's search finds a name.", class_="note"),
            parts.legend(clients),
            class_="clients mixtures",
        ),
    )


def _clients(study: Study) -> Markup:
    """Every client of the reference's first seed, worst first, under every method."""
    seed, run = next(iter(study.runs[study.reference].items()))
    scores = {label: client_accuracies(runs[seed].selected()) for label, runs in study.runs.items() if seed in runs}
    order = sorted(range(len(run.client_names)), key=lambda client: scores[study.reference][client])
    tasks, groups = known_tasks(run), other_groups(run)
    columns = (
        Column("Client", "text"),
        *((Column("Task", "text"),) if tasks is not None else ()),
        *((Column("Group", "whole"),) if groups is not None else ()),
        Column("Train", "whole", "examples"),
        Column("Test", "whole", "examples"),
        *(Column(f"{label} (%)", "percent") for label in scores),
    )
    rows = tuple(
        (
            run.client_names[client],
            *((tasks[client],) if tasks is not None else ()),
            *((groups[client],) if groups is not None else ()),
            run.num_train[client],
            run.num_test[client],
            *(float(accuracy[client]) for accuracy in scores.values()),
        )
        for client in order[:CLIENT_ROWS]
    )
    table = Table(columns, rows, f"Test accuracy of the clients of seed {seed}")
    shown = f"{len(rows)} of {len(order)}" if len(rows) < len(order) else f"All {len(order)}"
    about = f"{shown} clients of seed {seed}, at the selected rounds; worst under {study.reference} first."
    title = element("p", f"Every client of seed {seed}", class_="title")
    return element("div", title, parts.table(table), element("p", about, class_="note"), class_="clients")


def _samples(study: Study) -> Markup:
    """What the methods' models write for the same prompts; nothing for other networks."""
    found = samples_table(study)
    return Markup("") if found is None else element("div", parts.table(found, longest=TEXT), class_="samples")


def _provenance(study: Study) -> Markup:
    columns = (
        Column("Run", "text"),
        Column("Seed", "whole"),
        Column("Status", "text"),
        Column("Round selected", "whole"),
        Column("Last round", "whole"),
        Column("Parameters", "count"),
        Column("Data (sha256)", "text"),
    )
    rows = tuple(
        (run.label, run.seed, run.status, run.selected().round, run.last().round, run.num_params, run.data_sha256[:16])
        for run in study.all_runs()
    )
    first = {label: next(iter(runs.values())) for label, runs in study.runs.items()}
    options = {f"{label} ({run.method})": plain_options(run.options) for label, run in first.items()}
    return join(
        parts.table(Table(columns, rows, "Runs with their status and data hash"), study),
        element("p", "Options", class_="title"),
        parts.definitions(options),
        element("p", "Versions", class_="title"),
        parts.definitions(_versions(study)),
    )


def _versions(study: Study) -> dict[str, str]:
    """Versions -> the runs that ran on them."""
    found: dict[str, list[RunRecord]] = {}
    for run in study.all_runs():
        found.setdefault(", ".join(f"{name} {value}" for name, value in run.versions.items()), []).append(run)
    if len(found) == 1:
        return {"All runs": next(iter(found))}
    return {_who(runs): versions for versions, runs in found.items()}


def _who(runs: Sequence[RunRecord]) -> str:
    seeds: dict[str, list[int]] = {}
    for run in runs:
        seeds.setdefault(run.label, []).append(run.seed)
    return listed([f"{label} (seed {ranges(numbers)})" for label, numbers in seeds.items()])
