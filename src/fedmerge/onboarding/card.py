"""The README of a new client's model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def model_card(plain: Mapping[str, Any], module: str) -> str:
    """A model card in Markdown from what ``onboard.json`` says.

    Args:
        plain: `Onboarded.plain`.
        module: Class of the network, for runs whose recipe is not known.
    """
    run, fit = plain["run"], plain["fit"]
    made = plain["way"] + (f", {plain['epochs']} epochs" if plain["epochs"] else "")
    row = plain["row"] if isinstance(plain["row"][0], list) else [plain["row"]]
    weights = "; ".join(", ".join(f"{weight:.3f}" for weight in part) for part in row)
    return f"""# A new client's model

Made by fedmerge {plain["fedmerge"]} from {plain["num_samples"]} labelled samples and the server's models of the run
`{run["label"]}` (method {run["method"]}, seed {run["seed"]}; {run["setting"]}).

| | |
|---|---|
| way | {made} |
| merging weights | {weights} |
| expected accuracy | {_expected(plain)} |
| fit | **{fit["verdict"]}**: {fit["reason"]} |

## Ways that were tried

{candidates_table(plain["candidates"])}
Accuracy and loss (nats) are those on held-out samples. The expected accuracy above counts every held-out sample under
the way that was chosen without its part of them, so that choosing does not flatter it.

## Use

{_use(plain, module)}
## Limits

The estimate holds for further samples drawn like those given. The interval is Wilson's at 95 % and knows nothing of a
change of the data. The files hold numbers and text only. The merging weights and the nearest clients say whom this
client is like: this file and `onboard.json` are not for publication, and only their owner may read them.
"""


def candidates_table(candidates: list[Mapping[str, Any]]) -> str:
    """All that was tried as a Markdown table."""
    lines = ["| way | epochs | accuracy | loss | |", "|---|--:|--:|--:|---|"]
    for tried in candidates:
        accuracy = "–" if tried["accuracy"] is None else f"{100 * tried['accuracy']:.1f} %"
        loss = "–" if tried["loss"] is None else f"{tried['loss']:.3f}"
        mark = "chosen" if tried["chosen"] else ""
        lines.append(f"| {tried['way']} | {tried['epochs'] or '–'} | {accuracy} | {loss} | {mark} |")
    return "\n".join(lines) + "\n"


def _expected(plain: Mapping[str, Any]) -> str:
    estimate = plain["estimate"]
    if estimate is None:
        return f"not known ({plain['missing']})"
    low, high = 100 * estimate["low"], 100 * estimate["high"]
    return f"{100 * estimate['accuracy']:.1f} % ({low:.1f} to {high:.1f} %), {estimate['how']}"


def _use(plain: Mapping[str, Any], module: str) -> str:
    inputs, recipe = plain["inputs"], plain["model"]
    classes = len(plain["class_names"])
    if recipe is None or recipe["name"] == "import" or inputs is None:
        make = f"module = ...  # the {module} that the run was made with"
        imports = ""
    else:
        make = (
            f"recipe = NETWORKS.build({recipe!r}, 'model', [])\n"
            f"module = recipe.build({tuple(inputs['shape'])!r}, {classes})"
        )
        imports = "from fedmerge.models import NETWORKS\n"
    scaling = "Inputs are scaled as the run's clients scaled theirs."
    if inputs is not None:
        scaling = (
            f"Raw inputs are {inputs['dtype']} {inputs['shape']}; the network is given `(x - mean) / std` with `mean` "
            "and `std` under `inputs` in `onboard.json`."
        )
    return f"""```python
from safetensors.torch import load_file

{imports}{make}
module.load_state_dict(load_file("model.safetensors"))
module.eval()
```

{scaling} Output k stands for class k of {", ".join(plain["class_names"])}.

"""
