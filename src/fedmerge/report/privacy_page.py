"""The privacy of a run as a chapter of the report and as a page of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fedmerge.core.crowd import SMALL
from fedmerge.core.errors import UsageError
from fedmerge.core.files import write_atomically
from fedmerge.experiment.record import RunRecord
from fedmerge.report import parts
from fedmerge.report.document import document
from fedmerge.report.markup import Markup, element, join
from fedmerge.report.privacy import Privacy, privacy, why_none
from fedmerge.report.privacy_figure import crowds
from fedmerge.report.privacy_text import method_table, privacy_table, sentences
from fedmerge.report.study import Study
from fedmerge.report.text import plural

ROWS = 200  # clients of a table within the report; the page of a run has all
NAME = 30  # characters of a name in the table


def privacy_chapter(study: Study) -> Markup:
    """The methods side by side, and the clients of the reference's first seed."""
    run = next(iter(study.runs[study.reference].values()))
    methods = method_table(study) if len(study.labels) > 1 else None
    beside = Markup("") if methods is None else join(parts.table(methods, study), parts.legend(methods))
    where = f"{run.label}, seed {run.seed}, weights of round {run.last().round}, the last evaluated one."
    return join(beside, element("p", where, class_="note"), _body(privacy(run), ROWS))


def _body(found: Privacy, most: int | None) -> Markup:
    """Sentences; figure and table where there are crowds."""
    said = element("ul", *(element("li", words) for words in sentences(found)), class_="remarks")
    if found.found is None:
        return said
    table = privacy_table(found, most)
    listed = element("div", parts.table(table, longest=NAME), parts.legend(table), class_="clients mixtures")
    return join(said, parts.figures(crowds(found)), listed)


def public_crowds(study: Study) -> Markup:
    """What may be published of the crowds: how many are small, by method; no client, no row."""
    said = [_public_sentence(privacy(next(iter(runs.values())))) for runs in study.runs.values()]
    return element("ul", *(element("li", words) for words in said), class_="remarks")


def _public_sentence(found: Privacy) -> str:
    label, total = f"{found.run.label}, seed {found.run.seed}", len(found.run.client_names)
    if found.found is None:
        return f"{label}: {why_none(found)}."
    crowds_of = found.effective if found.smallest is None else np.fmin(found.effective, found.smallest)
    count = int((crowds_of < SMALL).sum())
    return (
        f"{label}: {count or 'none'} of {plural(total, 'client')} had a crowd K_eff below {SMALL}, in which it could "
        "read others' updates off its own models."
    )


def write_privacy(run: RunRecord, target: Path) -> Path:
    """Writes the page of a run, which only its owner may read: it says who is like whom.

    Args:
        run: Any run.
        target: The file to write; missing folders are made.

    Returns:
        The file.

    Raises:
        UsageError: if the target is a folder.
        FedmergeError: if the run was stopped before its first evaluation.
    """
    target = Path(target)
    if target.is_dir():
        raise UsageError(f"{target} is a folder; give the file to write, for example {target / 'privacy.html'}")
    page = document(f"privacy of {run.label}", _main(privacy(run)))
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, page, private=True)
    return target


def _main(found: Privacy) -> Markup:
    run = found.run
    header = element(
        "header",
        element("p", run.setting, class_="kicker"),
        element("h1", f"What clients could read of each other in {run.label}"),
        element("p", f"Seed {run.seed}, weights of round {found.round}, the last evaluated one.", class_="note"),
    )
    return element("main", header, element("section", _body(found, None)))
