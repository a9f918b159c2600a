"""How an exported pretrained model is loaded, as Python that runs in its folder without fedmerge."""

from __future__ import annotations

import json
from typing import Literal

from fedmerge.exporting.pretrained import Pretrained
from fedmerge.models._weights import quietly

Kind = Literal["peft", "merged", "mergekit"]

_LOADERS = {
    "classify": "AutoModelForSequenceClassification",
    "tag": "AutoModelForTokenClassification",
    "complete": "AutoModelForCausalLM",
    "images": "AutoModelForImageClassification",
}
_MEAN = """\
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state.float()
    real = batch["attention_mask"][..., None].float()
    mean = (hidden * real).sum(dim=1) / real.sum(dim=1).clamp_min(1)
    return torch.nn.functional.linear(mean, head["weight"], head["bias"])"""
_OWN = """\
    with torch.no_grad():
        return model(**batch).logits.float()"""


def snippet(parts: Pretrained, kind: Kind) -> str:
    """Defines ``model`` and ``logits``, which gives [n, classes] in the order of ``classes``; or ``complete``."""
    return "\n".join([*_imports(parts, kind), "", *_loading(parts, kind), "", *_use(parts)])


def _loader(parts: Pretrained) -> str:
    return "AutoModel" if parts.head is not None else _LOADERS[parts.recipe.task]


def _imports(parts: Pretrained, kind: Kind) -> list[str]:
    lines = ["import json", ""] if parts.image is not None else []
    lines += ["import torch"]
    if kind == "peft":
        lines += ["from peft import PeftModel"]
    if parts.head is not None or (kind == "mergekit" and parts.saved):
        lines += ["from safetensors.torch import load_file"]
    names = _loader(parts) + (", AutoTokenizer" if parts.image is None else "")
    return [*lines, f"from transformers import {names}"]


def _loading(parts: Pretrained, kind: Kind) -> list[str]:
    base = _quoted(parts.base_name)
    load = f"{_loader(parts)}.from_pretrained({{}}, dtype=torch.{parts.recipe.dtype}{_asked_for(parts, kind)})"
    lines = {
        "peft": [f"base = {load.format(base)}", 'model = PeftModel.from_pretrained(base, ".").eval()'],
        "merged": [f"model = {load.format(_quoted('.'))}.eval()"],
        "mergekit": [f"model = {load.format(_quoted('merged'))}.eval()"],
    }[kind]
    if parts.head is not None:
        lines += ['head = load_file("head.safetensors")']
    elif kind == "mergekit" and parts.saved:
        lines += ['model.load_state_dict(load_file("head.safetensors"), strict=False)']
    if parts.classes:
        lines += [f"classes = [{', '.join(map(_quoted, parts.classes))}]"]
    if parts.image is None:
        lines += [f"tokenizer = AutoTokenizer.from_pretrained({base if kind != 'merged' else _quoted('.')})"]
        if _lacks_padding(parts):
            pad = int(parts.body.config.pad_token_id or 0)
            lines += [f"tokenizer.pad_token = tokenizer.convert_ids_to_tokens({pad})  # it has none of its own"]
    return lines


def _asked_for(parts: Pretrained, kind: Kind) -> str:
    """What the base's own configuration does not say of an output layer."""
    if kind == "merged" or parts.head is not None or not parts.classes:
        return ""
    pad = f", pad_token_id={int(parts.body.config.pad_token_id or 0)}" if _lacks_padding(parts) else ""
    other = ", ignore_mismatched_sizes=True" if parts.replaces else ""
    return f", num_labels={len(parts.classes)}{pad}{other}"


def _quoted(text: str) -> str:
    """A Python literal in double quotes."""
    return json.dumps(text, ensure_ascii=False)


def _lacks_padding(parts: Pretrained) -> bool:
    if parts.image is not None or parts.recipe.task == "complete":
        return False
    from transformers import AutoTokenizer  # noqa: PLC0415 - optional extra

    with quietly():
        return AutoTokenizer.from_pretrained(parts.base_folder, trust_remote_code=False).pad_token is None


def _use(parts: Pretrained) -> list[str]:
    return {"classify": _of_texts, "tag": _of_words, "complete": _completing, "images": _of_images}[parts.recipe.task](
        parts
    )


def _of_texts(parts: Pretrained) -> list[str]:
    return [
        "def logits(texts):",
        '    cut = {"truncation": True, "max_length": '
        f'{parts.recipe.max_length}, "padding": True, "padding_side": "right"}}',
        '    batch = tokenizer(texts, return_tensors="pt", **cut)',
        *(_OWN if parts.head is None else _MEAN).splitlines(),
    ]


def _of_words(parts: Pretrained) -> list[str]:
    return [
        "def logits(text):  # words with spaces between them; one row for each word",
        f'    cut = {{"truncation": True, "max_length": {parts.recipe.max_length}}}',
        '    batch = tokenizer([text.split()], is_split_into_words=True, return_tensors="pt", **cut)',
        "    pieces = batch.word_ids(0)",
        "    first = [pieces.index(word) for word in range(len(text.split())) if word in pieces]",
        "    with torch.no_grad():",
        "        return model(**batch).logits[0, first].float()",
    ]


def _completing(parts: Pretrained) -> list[str]:
    return [
        "def complete(prompt, most=40):",
        "    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]",
        f'    own = tokenizer(prompt + {_quoted(parts.recipe.separator)}, add_special_tokens=False)["input_ids"]',
        "    ids = torch.tensor([start + own])",
        '    how = {"max_new_tokens": most, "do_sample": False, "eos_token_id": tokenizer.eos_token_id}',
        "    found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **how)",
        "    return tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)",
    ]


def _of_images(parts: Pretrained) -> list[str]:
    """Scaled as the run scaled them, not as the base's own image processor would."""
    height, width = parts.image or (0, 0)
    return [
        'with open("inputs.json") as file:',
        "    inputs = json.load(file)",
        'mean, std = torch.tensor(inputs["mean"]), torch.tensor(inputs["std"])',
        "",
        "def logits(images):  # raw, [n, channels, height, width]",
        "    pixels = (torch.as_tensor(images).float() - mean) / std",
        "    pixels = pixels if pixels.shape[1] == 3 else pixels[:, :1].expand(-1, 3, -1, -1)",
        f"    if pixels.shape[2:] != ({height}, {width}):",
        '        how = {"mode": "bilinear", "align_corners": False}',
        f"        pixels = torch.nn.functional.interpolate(pixels, size=({height}, {width}), **how)",
        "    with torch.no_grad():",
        "        return model(pixel_values=pixels).logits.float()",
    ]
