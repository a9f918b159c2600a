"""``fedmerge deploy``: a federation across machines."""

from __future__ import annotations

import argparse
import csv
import io
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table as Grid

from fedmerge.cli.screen import escape, out, say
from fedmerge.cli.words import table_from
from fedmerge.core.errors import FedmergeError, UsageError
from fedmerge.core.files import write_atomically
from fedmerge.core.text import shortened
from fedmerge.experiment.config import override


def _said(text: str) -> None:
    """One line of what happens, at once also where it goes to a file."""
    say(text)
    out.file.flush()


# ---------------------------------------------------------------- making


def init(options: argparse.Namespace) -> None:
    """Writes the folder, and says what to do next."""
    from fedmerge.deploy.blueprint import Blueprint, write_blueprint  # noqa: PLC0415 - other commands do not need it
    from fedmerge.deploy.demo import demo_names, demo_site_table, write_demo_data  # noqa: PLC0415
    from fedmerge.deploy.federation import terms_of  # noqa: PLC0415

    if options.demo is not None and (options.sites or options.like):
        raise UsageError("--demo brings sites and data of its own; leave --sites and --like out")
    if options.demo is not None and not 2 <= options.demo <= 25:
        raise UsageError(f"--demo: got {options.demo}; expected 2 to 25 sites")
    sites = demo_names(options.demo) if options.demo is not None else _names(options.sites)
    own = override(table_from(options.config), options.words)
    deploy = own.pop("deploy", {})
    config = {**_DEMO, **own} if options.demo is not None else own
    folder = Path(options.folder)
    data = config.pop("data", None) or _schema_table(options, config)
    terms_of({**config, "data": data})  # all that is wrong with it is told before anything is written
    blueprint = Blueprint(
        name=options.name or folder.absolute().name,
        address=options.address,
        listen=options.listen,
        sites=sites,
        hosts=tuple(options.host),
        insecure=options.insecure,
        config=config,
        data=data,
        deploy=deploy,
        site_data=dict.fromkeys(sites, demo_site_table()) if options.demo is not None else {},
    )
    write_blueprint(folder, blueprint)
    if options.demo is not None:
        write_demo_data(folder, sites)
    _next_steps(folder, sites, demo=options.demo is not None)


_DEMO: dict[str, Any] = {"rounds": 5, "evaluate_every": 1}


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _schema_table(options: argparse.Namespace, config: dict[str, Any]) -> dict[str, Any]:
    """Table ``data``, from an example or the demo.

    Raises:
        UsageError: if there is neither.
    """
    from fedmerge.deploy.demo import demo_schema  # noqa: PLC0415
    from fedmerge.deploy.schema import schema_of_example  # noqa: PLC0415
    from fedmerge.experiment.config import build_config, plain_options  # noqa: PLC0415
    from fedmerge.experiment.federation import encoder_of  # noqa: PLC0415

    if options.demo is not None:
        return plain_options(demo_schema())
    if options.like is None:
        raise UsageError(
            "--like: none given; name a file or folder that looks like those of the sites (one of them, or a made-up "
            "one): its columns, classes and scale become those of the federation. Or give a table `data` in --config"
        )
    schema = schema_of_example(
        options.like,
        label_column=options.label_column,
        text_column=options.text_column,
        standardise=options.standardise,
        scale="pooled" if options.pooled else "given",
        class_names=_names(options.classes),
        encoder=encoder_of(build_config(config).model),
    )
    return plain_options(schema)


def _next_steps(folder: Path, sites: Sequence[str], *, demo: bool) -> None:
    say(f"federation  {folder}/federation.toml")
    say(f"sites       {', '.join(sites) or 'none yet: fedmerge deploy add'}")
    if demo:
        say(f"next        fedmerge deploy up {folder}")
        return
    say(f"next        copy each folder of {folder}/sites to its machine, say in its site.toml where the data is, then")
    say("            at each site   fedmerge deploy check SITE; fedmerge deploy start site SITE")
    if (folder / "nginx.conf").is_file():
        say(f"            on the server  nginx -c {folder.absolute()}/nginx.conf   (or the container of compose.yaml)")
    say(f"            on the server  fedmerge deploy start server {folder}; fedmerge deploy run {folder}")


def add(options: argparse.Namespace) -> None:
    """Adds a site, or another key of one, and says where its folder is."""
    from fedmerge.deploy.members import add_site  # noqa: PLC0415

    line = None
    if options.public_key is not None:
        try:
            line = Path(options.public_key).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UsageError(f"--public-key: {options.public_key} cannot be read: {error}") from error
    say(f"site        {add_site(options.folder, options.name, line)}")


def remove(options: argparse.Namespace) -> None:
    """Takes a site out and says where its folder is now."""
    from fedmerge.deploy.members import remove_site  # noqa: PLC0415

    place = remove_site(options.folder, options.name)
    say(f"removed     {options.name}: its key is taken off the SuperLink at the next start of a run")
    if place is not None:
        say(f"its folder  {place}")


def renew(options: argparse.Namespace) -> None:
    """Makes a new certificate and says what must be started again."""
    from fedmerge.deploy.members import renew_certificate  # noqa: PLC0415

    found = renew_certificate(options.folder, days=options.days, hosts=options.host)
    say(f"certificate {Path(options.folder) / 'server.crt'}, {found.days_left:.0f} days, for {', '.join(found.hosts)}")
    say("next        start the server (fedmerge deploy start server) and the proxy (nginx) again; sites need nothing")


def key(options: argparse.Namespace) -> None:
    """Makes a key pair and shows the public line."""
    from fedmerge.deploy.members import make_site_key  # noqa: PLC0415

    say(make_site_key(options.folder))


# ---------------------------------------------------------------- before and during


def check(options: argparse.Namespace) -> None:
    """One line for each question; fails if one is not well."""
    from fedmerge.deploy.check import check_site  # noqa: PLC0415

    findings = check_site(options.folder, network=not options.offline)
    for found in findings:
        mark = "[green]ok[/]  " if found.ok else "[bold red]NO[/]  "
        out.print(mark + escape(f"{found.name:16} {found.detail}"))
    wrong = [found.name for found in findings if not found.ok]
    if wrong:
        raise FedmergeError(f"not ready: {', '.join(wrong)}")
    say("ready")


def rehearse(options: argparse.Namespace) -> None:
    """Runs in one process and shows what each site would get."""
    from fedmerge.deploy.federation import read_federation  # noqa: PLC0415
    from fedmerge.deploy.rehearsal import rehearse as rehearsed  # noqa: PLC0415

    federation = read_federation(options.folder)
    folder = None if options.out is None else Path(options.out)
    _scores(rehearsed(federation, folder).record)


def start(options: argparse.Namespace) -> None:
    """Runs a part until told to end, or writes the unit that does."""
    from fedmerge.deploy.operate import start_server, start_site  # noqa: PLC0415

    if options.unit:
        _unit(options)
        return
    (start_server if options.what == "server" else start_site)(options.folder, _said)


def _unit(options: argparse.Namespace) -> None:
    from fedmerge.deploy.members import write_site_unit  # noqa: PLC0415
    from fedmerge.deploy.units import NOBODY  # noqa: PLC0415

    if options.what == "server":
        raise UsageError(f"--unit: got one for the server; its units are in {Path(options.folder) / 'systemd'}")
    path = write_site_unit(options.folder)
    say(f"unit        {path}")
    if f"User={NOBODY}\n" in path.read_text(encoding="utf-8"):
        say(f"first       put a user that is not root in the place of {NOBODY}, and give it the site's folder")
    say(f"next        systemctl link {path}; systemctl enable --now {path.name}")


def run(options: argparse.Namespace) -> None:
    """Trains, and shows what each site has."""
    from fedmerge.deploy.operate import run_until_done  # noqa: PLC0415

    _scores(run_until_done(options.folder, _said))


def up(options: argparse.Namespace) -> None:
    """All parts here, until done."""
    from fedmerge.deploy.operate import run_here  # noqa: PLC0415

    _scores(run_here(options.folder, _said))


def _scores(record: Any) -> None:
    """Accuracy of every site's own model at the selected round."""
    selected = record.selected()
    grid = Grid(box=SIMPLE_HEAD, padding=(0, 1))
    for heading in ("Site", "Train", "Validation (%)", "Test (%)"):
        grid.add_column(heading, justify="left" if heading == "Site" else "right")
    for i, name in enumerate(record.client_names[:_MOST_ROWS]):
        scores = (selected.validation, selected.test)
        shown = ["–" if s is None or s.accuracy[i] is None else f"{100 * s.accuracy[i]:.1f}" for s in scores]
        grid.add_row(escape(name), str(record.num_train[i]), *shown)
    chosen = "the best on validation" if record.select == "validation" else "the last"
    done = f"{record.last().round} rounds of {record.method}"
    out.print(f"[bold]{escape(record.label)}[/]: {done}; models of round {selected.round}, {chosen}")
    out.print(grid)


_MOST_ROWS = 50


# ---------------------------------------------------------------- looking


def status(options: argparse.Namespace) -> None:
    """What the server last said of the run and of each site."""
    from fedmerge.deploy.deployment import read_deployment  # noqa: PLC0415
    from fedmerge.deploy.federation import read_federation  # noqa: PLC0415
    from fedmerge.deploy.status import read_status  # noqa: PLC0415

    federation = read_federation(options.folder)
    found = read_status(federation.run_folder)
    if found is None:
        say("no run yet: fedmerge deploy run")
        return
    deployment = read_deployment(federation.run_folder)
    say(f"round {found.round} of {found.rounds}: {found.phase} ({_ago(found.updated)})")
    if deployment is not None and deployment.stopped:
        say(f"stopped: {deployment.stopped}")
    grid = Grid(box=SIMPLE_HEAD, padding=(0, 1))
    for heading in ("Site", "Last seen", "Asked", "Answered", "Refused", "Model", "Said"):
        grid.add_column(heading, justify="right" if heading == "Refused" else "left")
    delivered = () if deployment is None else deployment.delivered
    for name in federation.living:
        site = found.sites.get(name)
        cells = [name, "never", "", "", "0", "", ""]
        if site is not None:
            has = "yes" if name in delivered else ""
            said = shortened(site.told, 60)
            cells = [name, _ago(site.seen), site.asked, site.answered, str(site.refusals), has, said]
        grid.add_row(*(escape(cell) for cell in cells))
    out.print(grid)
    for text in found.strangers:
        say(f"turned away: {text}")


def _ago(moment: float) -> str:
    if moment <= 0:
        return "never"
    seconds = max(0.0, time.time() - moment)
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


# ---------------------------------------------------------------- after training


def predict(options: argparse.Namespace) -> None:
    """Class and probabilities of every row, as CSV."""
    from fedmerge.deploy.site_use import read_site_model  # noqa: PLC0415

    model = read_site_model(options.folder)
    found = model.predict(options.rows)
    header = ["class", *(f"probability of {name}" for name in model.class_names)]
    rows = [
        [name, *(f"{p:.6f}" for p in row)] for name, row in zip(found.names, found.probabilities.tolist(), strict=True)
    ]
    with io.StringIO(newline="") as text:
        csv.writer(text, lineterminator="\n").writerows([header, *rows])
        content = text.getvalue()
    if options.out is None:
        say(content.rstrip("\n"))
        return
    write_atomically(Path(options.out), content)
    say(f"{len(rows)} rows  {options.out}")


def export(options: argparse.Namespace) -> None:
    """Writes the folder and names its files."""
    from fedmerge.deploy.site_use import read_site_model  # noqa: PLC0415

    found = read_site_model(options.folder).export(options.kind, options.out)
    for name in found.files:
        say(str(found.folder / name))
    if found.difference is not None:
        say(f"difference  {found.difference:.1e} (of outputs, at most)")


def offer(options: argparse.Namespace) -> None:
    """Writes the package and says what it tells."""
    from fedmerge.deploy.federation import read_federation  # noqa: PLC0415
    from fedmerge.deploy.offer import make_offer  # noqa: PLC0415

    found = make_offer(read_federation(options.folder).run_folder, options.out)
    say(f"offer       {found.folder}; what is in it and what is not: {found.folder}/README.md")


def join(options: argparse.Namespace) -> None:
    """Makes the model and says how good it is."""
    from fedmerge.deploy.joining import join as joined  # noqa: PLC0415
    from fedmerge.deploy.site import read_site  # noqa: PLC0415

    found = joined(Path(options.offer), read_site(options.folder), way=options.way)
    say(f"model       {found.folder}")
    say(f"made by     {found.onboarded.way} from {found.onboarded.num_samples} examples")
    if found.test.accuracy is not None:
        say(f"test        {100 * found.test.accuracy:.1f} % of the site's own test examples")


def forget(options: argparse.Namespace) -> None:
    """Removes a site and says plainly what is left."""
    from fedmerge.deploy.forget import forget_site  # noqa: PLC0415

    found = forget_site(options.folder, options.name)
    for text in found.removed:
        say(f"removed     {text}")
    for text in found.remains:
        say(f"remains     {text}")
    for text in found.left:
        say(f"see to      {text}")


def forget_own(options: argparse.Namespace) -> None:
    """Removes a site's own state."""
    from fedmerge.deploy.forget import forget_own_state  # noqa: PLC0415

    found = forget_own_state(options.folder, model=options.model)
    for text in found.removed:
        say(f"removed     {text}")
    for text in found.kept:
        say(f"kept        {text}")


def simulate(options: argparse.Namespace) -> None:
    """Runs on Ray and shows what each site would get."""
    from fedmerge.deploy.flower.simulate import simulate as simulated  # noqa: PLC0415
    from fedmerge.experiment.record import read_run  # noqa: PLC0415

    found = simulated(options.folder, options.out, cpus=options.cpus, tell=_said)
    _scores(read_run(found.folder))
    say(f"start {found.start:.1f} s, rounds {found.rounds:.1f} s")
