"""Pretrained models small enough for tests, made here: nothing is fetched. Each maker returns its folder's path."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTModel,
)
from transformers.utils import logging

from fedmerge.core.randomness import fresh_module_randomness

SENTENCES = (
    "the food was good and the room was clean",
    "a bad day with rain and cold wind",
    "they play a good game in the green field",
    "the bank lowers its rate again this year",
    "our team won the last match of the cup",
    "prices of oil and gold fall on the market",
    "is this great yes or no",
    "what a terrible film with a weak plot",
)
"""Whose words the tokenizers know; others fall into letters."""
WIDTH = 32
END = "<|end|>"


def tiny_bert(folder: Path | str) -> str:
    """An encoder of three blocks, as a checkpoint of the bare model."""
    tokenizer = _word_pieces()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.3,
    )
    return _saved(folder, lambda: BertModel(config), tokenizer)


def tiny_gpt2(folder: Path | str) -> str:
    """A language model of two blocks without a padding token."""
    tokenizer = _byte_pairs()
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=WIDTH,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.3,
    )
    return _saved(folder, lambda: GPT2LMHeadModel(config), tokenizer)


def tiny_llama(folder: Path | str) -> str:
    """A language model of two blocks with rotary positions and grouped heads."""
    tokenizer = _byte_pairs()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.3,
    )
    return _saved(folder, lambda: LlamaForCausalLM(config), tokenizer)


def tiny_vit(folder: Path | str) -> str:
    """A vision transformer of two blocks for images of 16 x 16."""
    config = ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=16,
        patch_size=8,
        initializer_range=0.3,
    )
    return _saved(folder, lambda: ViTModel(config), None)


def _saved(folder: Path | str, make: Callable[[], Any], tokenizer: Any) -> str:
    """Weights from one draw, and the tokenizer, in a folder."""
    logging.disable_progress_bar()
    with fresh_module_randomness(0, "tiny pretrained weights"):
        model = make()
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return str(folder)


def _words() -> list[str]:
    return sorted({word for sentence in SENTENCES for word in sentence.split()})


def _word_pieces() -> Any:
    """Whole words of the sentences, and letters for others."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = dict.fromkeys([*special, *_words(), *letters, *(f"##{letter}" for letter in letters)])
    own = Tokenizer(models.WordPiece({piece: k for k, piece in enumerate(pieces)}, unk_token="[UNK]"))  # noqa: S106
    own.normalizer = normalizers.Lowercase()
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(name, own.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    own.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=own, model_max_length=64, **names)


def _byte_pairs() -> Any:
    """All bytes, and merges that build the words of the sentences letter by letter."""
    spelled = [space + word for word in _words() for space in ("", "Ġ")]
    merges = dict.fromkeys((word[:k], word[k]) for word in spelled for k in range(1, len(word)))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = dict.fromkeys([END, *alphabet, *(first + second for first, second in merges)])
    own = Tokenizer(models.BPE({piece: k for k, piece in enumerate(pieces)}, list(merges)))
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=own, bos_token=END, eos_token=END, model_max_length=64)
