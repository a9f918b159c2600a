"""The page of what `rivals.py` measured; every number and every sentence with one comes from the JSON files beside it.

Usage: python benchmarks/speed/rivals_page.py benchmarks/results/speed
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

REFERENCE = "fedmerge:sequential"
ORDER = ("logistic", "mlp", "cnn", "resnet9", "resnet9-paper", "lora")
NAMES = {"reused": "one reused module", "loader": "DataLoader", "channels_last": "channels_last"}
NOTES = {
    "authors": "the authors' FedMerge with five models; its proximal term and the scores it notes of the last local "
    "epoch cannot be switched off",
    "pfllib": "FedAvg; reads every client's examples from a file in every round",
    "flower": "FedAvg on Ray with one actor, server and all of Ray's processes on the one core; logs as it comes",
    "pfl": "FederatedAveraging; does not shuffle",
    "blazefl": "FedAvg with the serial trainer",
}
SEEN = 0.05
"""Milliseconds below which a kind of layer is not shown."""
LEAST_PART = 0.03
"""Of a contestant's time: differences of parts below this are not named."""

Found = dict[str, Any]


def page(folder: Path) -> str:
    """The whole page."""
    all_found = [json.loads(path.read_text()) for path in sorted(folder.glob("rivals-*.json"))]
    all_found.sort(key=lambda found: ORDER.index(found["workload"]["name"]))
    return "\n".join([_head(all_found), *(_section(found) for found in all_found)])


def _head(all_found: list[Found]) -> str:
    reasons = sorted({found["preliminary"] for found in all_found if found["preliminary"]})
    warning = [f"**Preliminary: {reason}. Do not quote these numbers.**\n" for reason in reasons]
    notes = [f"- `{name}`: {text}." for name, text in NOTES.items()]
    return "\n".join(
        [
            "# A round against other simulators, on one core\n",
            *warning,
            "Written by `benchmarks/speed/rivals.py`, whose docstring says how a rival's Python is made. All "
            "contestants train the same network from the same start on the same random examples with the same number "
            "of steps of plain SGD in float32; torch of one version, one thread, one core. They take turns, one round "
            "each; start-up and a first round are not timed, and evaluation is off except in its own column. The unit "
            "is milliseconds per client-step: a round's time, server included, over the steps of all its clients. Wall "
            "times are medians with the smallest and largest; processor times are of the contestant's whole "
            "process tree.\n",
            "`fedmerge:RUNTIME` is this package's FedAvg; `+authors` is FedMerge with five models and the authors' "
            "rule. `naive` copies the network for each client and indexes its batches; `naive@blazefl` is the same "
            "under the Python that BlazeFL runs in. Others:\n",
            *notes,
            "",
        ]
    )


def _section(found: Found) -> str:
    work, limits = found["workload"], _limits(found)
    lines = [
        f"## {work['name']}\n",
        f"Command: `{found['command']}`; fedmerge {found['versions']['fedmerge']} {found.get('commit', '')}, "
        f"torch {found['versions']['torch']}, "
        f"Python {found['versions']['python']}; {found['machine']['cpu']}, {found['machine']['cores']} cores; load "
        f"average {found['load']['before'][0]:.1f} before and {found['load']['after'][0]:.1f} after; "
        f"{found['repeats']} repeats, {found['seconds']:.0f} s in all.\n",
        f"{work['clients']} clients with {work['examples']} examples {list(work['shape'])}, batch {work['batch']}, "
        f"{work['epochs']} epoch(s): {work['steps']} steps per client and round; {work['trainable']:,} trained "
        f"parameters of {work['parameters']:,}. "
        f"A step's products take {work['flops_per_step'] / 1e6:.2f} MFLOP; one core reaches {limits['peak']:.0f} "
        f"GFLOP/s (float32 products: {limits['gflops_matrix_product']:.0f} as matrix product, "
        f"{limits['gflops_convolution_1x1']:.0f} as 1x1 convolution) and copies {limits['gbytes_copied']:.0f} GB/s.\n",
        *_table(found, limits["peak"]),
        *[f"\n`{name}` did not take part: {reason}." for name, reason in found["absent"].items()],
        "\n### What the gaps are made of\n",
        "Measured by changing one thing of the plain loop at a time, and by a round of each contestant in which the "
        "calls that do its parts are timed (parts do not overlap); for images also by each kind of layer alone, "
        "forward and backward, in both layouts. Processor milliseconds per client-step.\n",
        *_parts_table(found),
        *_layers_table(found),
        "",
        *[f"- {sentence}" for sentence in _sentences(found)],
        "",
    ]
    return "\n".join(lines)


def _layers_table(found: Found) -> list[str]:
    """Layers of the network by layout; nothing where inputs are no images."""
    layers = found.get("layers")
    if not layers:
        return []
    kinds = [kind for kind in layers["channels_first"] if max(by[kind] for by in layers.values()) >= SEEN]
    lines = [f"\n| layout | {' | '.join(kinds)} |", "|---|" + "---|" * len(kinds)]
    lines += [f"| {layout} | {' | '.join(f'{by[kind]:.3f}' for kind in kinds)} |" for layout, by in layers.items()]
    return lines


def _limits(found: Found) -> dict[str, float]:
    """The better of the two measurements, before and after."""
    before, after = found["machine"]["limits"]
    best = {name: max(before[name], after[name]) for name in before}
    return {**best, "peak": max(best["gflops_matrix_product"], best["gflops_convolution_1x1"])}


def _middle(row: Found, what: str = "cpu") -> float:
    return float(statistics.median(row[what]))


def _own(found: Found, *, authors: bool = False) -> list[Found]:
    return [row for row in found["contestants"] if _is_own(row) and row["name"].endswith("+authors") == authors]


def _is_own(row: Found) -> bool:
    return bool(row["name"].startswith("fedmerge:"))


def _best(rows: list[Found], what: str = "cpu") -> Found | None:
    return min(rows, key=lambda row: _middle(row, what), default=None)


def _row(found: Found, name: str) -> Found | None:
    return next((row for row in found["contestants"] if row["name"] == name), None)


def _ratio(row: Found, other: Found | None, what: str) -> str:
    return "–" if other is None else f"{_middle(row, what) / _middle(other, what):.2f}"


def _table(found: Found, peak: float) -> list[str]:
    lines = [
        "| contestant | version | clients played | wall ms | smallest – largest | processor ms | wall / "
        "fedmerge:sequential | wall / best fedmerge | processor / best fedmerge | GFLOP/s | of the core's peak | wall "
        "ms with evaluation | steps counted |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(found["contestants"], key=lambda row: _middle(row, "wall")):
        speed = found["workload"]["flops_per_step"] / _middle(row) / 1e6
        evaluated = f"{_middle(row, 'evaluated_wall'):.3f}" if row["evaluated_wall"] else "–"
        lines.append(
            f"| `{row['name']}` | {_version(row)} | {row['clients']} | {_middle(row, 'wall'):.3f} "
            f"| {min(row['wall']):.3f} – {max(row['wall']):.3f} | {_middle(row):.3f} "
            f"| {_ratio(row, _row(found, REFERENCE), 'wall')} | {_ratio(row, _best(_own(found), 'wall'), 'wall')} "
            f"| {_ratio(row, _best(_own(found)), 'cpu')} | {speed:.1f} | {100 * speed / peak:.0f} % | {evaluated} "
            f"| {_counted(row)} |"
        )
    return lines


def _version(row: Found) -> str:
    versions = {name: version for name, version in row["versions"].items() if name not in ("torch", "python")}
    engine = f" ({row['engine']})" if row["engine"] else ""
    own = ", ".join(versions.values()) or "torch " + row["versions"]["torch"]
    return f"{own}{engine}, Python {row['versions']['python']}"


def _counted(row: Found) -> str:
    counted, steps = row["check"]["steps"], row["steps"]
    if "difference" in row["check"]:
        other = f"`{REFERENCE}+authors`" if row["name"].endswith("+authors") else "`naive`"
        return f"as planned, {steps} (same models as {other})" if counted == steps else f"**other models than {other}**"
    return f"{counted}" if counted == steps else f"**{counted} of {steps}**"


def _parts_table(found: Found) -> list[str]:
    names = list(dict.fromkeys(part for row in found["contestants"] for part in row["parts"] if part != "rest"))
    lines = [
        f"| contestant | {' | '.join(names)} | rest | untimed round |",
        "|---|" + "---|" * (len(names) + 2),
    ]
    for row in found["contestants"]:
        cells = [f"{row['parts'][name]:.3f}" if row["parts"].get(name) else "–" for name in names]
        lines.append(f"| `{row['name']}` | {' | '.join(cells)} | {row['parts']['rest']:.3f} | {_middle(row):.3f} |")
    return lines


def _sentences(found: Found) -> list[str]:
    return [*_left_out(found), *_own_against_plain(found), *_same_method(found), *_rivals_against_plain(found)]


def _left_out(found: Found) -> list[str]:
    """What one change of the plain loop does."""
    plain, sentences = _row(found, "naive"), []
    for variant, text in NAMES.items():
        row = _row(found, f"naive:{variant}")
        if plain is not None and row is not None:
            sentences.append(
                f"The plain loop with {text} takes {_ratio(row, plain, 'cpu')} of its processor time without "
                f"({_middle(row):.3f} against {_middle(plain):.3f} ms)."
            )
    both, laid = _row(found, "naive:channels_last+reused"), _row(found, REFERENCE)
    if both is not None and laid is not None:
        sentences.append(
            f"With channels_last and one reused module together it takes {_middle(both):.3f} ms; `{REFERENCE}`, which "
            f"does both, takes {_middle(laid):.3f} ms."
        )
    return sentences


def _own_against_plain(found: Found) -> list[str]:
    plain = _row(found, "naive")
    return [] if plain is None else [_difference(row, plain) for row in _own(found)]


def _rivals_against_plain(found: Found) -> list[str]:
    rivals = [row for row in found["contestants"] if row["name"] in NOTES]
    plain = [_row(found, f"naive@{row['name']}") or _row(found, "naive") for row in rivals]
    return [_difference(row, loop) for row, loop in zip(rivals, plain, strict=True) if loop is not None]


def _difference(row: Found, plain: Found) -> str:
    """How far a contestant is from the plain loop, and the parts that differ most."""
    gap, total = _middle(row) - _middle(plain), _middle(row)
    names = dict.fromkeys([*plain["parts"], *row["parts"]])
    more = f"{abs(gap):.3f} ms {'more' if gap > 0 else 'less'}"
    begun = f"`{row['name']}` takes {more} than `{plain['name']}` per client-step"
    if "clients' loops" in row["parts"]:
        inside = row["parts"]["clients' loops"]
        return f"{begun}: {inside:.3f} ms are its clients' loops, {row['parts']['rest']:.3f} ms everything around them."
    if row["engine"] not in (None, "Sequential"):
        return f"{begun}; it runs several clients at once, and its parts cannot be told apart by functions."
    moved = {name: row["parts"].get(name, 0.0) - plain["parts"].get(name, 0.0) for name in names}
    large = [name for name in sorted(moved, key=lambda n: -abs(moved[n])) if abs(moved[name]) > LEAST_PART * total]
    parts = ", ".join(f"{name} {moved[name]:+.3f}" for name in large)
    return f"{begun}; with its parts timed: {parts or 'no part differs by 3 %'}."


def _same_method(found: Found) -> list[str]:
    rival, own = _row(found, "authors"), _best(_own(found, authors=True))
    if rival is None or own is None:
        return []
    return [
        f"The authors' code against this package's FedMerge with their rule and five models (`{own['name']}`): "
        f"{_ratio(rival, own, 'cpu')} times the processor time, {_ratio(rival, own, 'wall')} times the wall time."
    ]


if __name__ == "__main__":
    sys.stdout.write(page(Path(sys.argv[1])))
