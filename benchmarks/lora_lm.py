"""Federated adapters of a small language model: a stand-in for a hub model, pretrained here from a configuration.

A GPT-2 of four blocks of width 128 learns English from film reviews; then clients adapt it to genres of the Brown
corpus, which it has not seen. The code path is that of any causal model of the Hugging Face hub.

Usage: python benchmarks/lora_lm.py OUT [--seeds 0,1] [--rounds 8] [--rates 0.003]
Several rates are tried on another seed by validation loss.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import fedmerge
from fedmerge.core.randomness import fresh_module_randomness, generator
from fedmerge.data.sources.brown import Brown
from fedmerge.data.sources.movie_reviews import MovieReviews

WIDTH, BLOCKS, VOCABULARY, LENGTH, ROWS = 128, 4, 4096, 48, 40_000
END = "<|end|>"
METHODS: dict[str, dict[str, Any]] = {
    "local": {"name": "local"},
    "fedavg momentum": {"name": "fedavg", "server_momentum": 0.5},
    "oracle momentum": {"name": "oracle", "server_momentum": 0.5},
    "fedmerge": {"name": "fedmerge"},
}
TUNING_SEED = 1000


def pretrained(folder: Path) -> Path:
    """Makes the stand-in once: tokenizer and weights from the reviews of IMDB."""
    if (folder / "model.safetensors").exists():
        return folder
    texts = [str(text) for text in MovieReviews(origin="imdb").load().inputs]
    own = Tokenizer(models.BPE())
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = decoders.ByteLevel()
    own.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[END], show_progress=False)
    )
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=own, bos_token=END, eos_token=END)  # type: ignore[no-untyped-call]
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=WIDTH,
        n_layer=BLOCKS,
        n_head=4,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    stream = torch.tensor([token for ids in tokenizer(texts)["input_ids"] for token in [0, *ids]])
    rows = stream[: ROWS * LENGTH].view(-1, LENGTH)
    with fresh_module_randomness(0, "stand-in weights"):
        model = GPT2LMHeadModel(config)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    steps = len(rows) // 64
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda s: min(1, s / 50) * (1 - s / steps))
    order = torch.from_numpy(generator(0, "stand-in order").permutation(len(rows)))
    for batch in torch.split(order, 64)[:steps]:
        loss = model(input_ids=rows[batch], labels=rows[batch]).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    count = sum(p.numel() for p in model.parameters())
    print(f"stand-in: {count:,} parameters, {len(rows):,} rows, loss {loss.item():.3f}", flush=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def one(base: Path, method: dict[str, Any], rate: float, seed: int, rounds: int, out: Path | None = None) -> Any:
    """One run on clients of the fifteen genres, two of each."""
    return fedmerge.run(
        Brown(max_chars=140, prompt_words=6),
        partition={"name": "task", "clients_per_task": 2, "train": 64, "validation": 12, "test": 24},
        model={"name": "hf", "path": str(base), "task": "complete", "rank": 8, "max_length": 64, "separator": " "},
        method=method,
        rounds=rounds,
        evaluate_every=4,
        seed=seed,
        training={"lr": rate, "optimizer": "adamw", "batch_size": 16, "epochs": 1},
        out=out,
    )


def mean_loss(losses: Any) -> float:
    """Mean over clients, nats per token of the completions."""
    known = [loss for loss in losses if loss is not None]
    return math.fsum(known) / len(known)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--rates", default="0.003")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    base = pretrained(options.out / "stand-in")
    lines, samples = [], None
    for label, method in METHODS.items():
        began = time.perf_counter()
        rates, tried = [float(word) for word in options.rates.split(",")], {}
        for rate in rates if len(rates) > 1 else ():
            record = one(base, method, rate, TUNING_SEED, options.rounds).record
            tried[rate] = min(mean_loss(r.validation.loss) for r in record.evaluated() if r.validation)
        rate = min(rates, key=lambda r: tried.get(r, 0.0))
        found = []
        for seed in map(int, options.seeds.split(",")):
            folder = options.out / f"{label.replace(' ', '-')}-seed{seed}"
            record = one(base, method, rate, seed, options.rounds, folder).record
            best = min((r for r in record.evaluated() if r.validation), key=lambda r: mean_loss(r.validation.loss))
            first = record.evaluated()[0]
            found.append(
                {
                    "seed": seed,
                    "loss": mean_loss(best.test.loss),
                    "accuracy": best.test.mean_accuracy(),
                    "untrained": mean_loss(first.test.loss),
                    "round": best.round,
                    "state": dict(record.rounds[-1].state),
                    "bytes": record.rounds[1].bytes_down / 30 if len(record.rounds) > 1 else 0,
                }
            )
            samples = record.samples if label == "fedmerge" and samples is None else samples
        lines.append(
            {"method": label, "lr": rate, "tried": tried, "runs": found, "seconds": time.perf_counter() - began}
        )
        print(
            label,
            rate,
            [round(f["loss"], 4) for f in found],
            statistics.mean(f["untrained"] for f in found),
            flush=True,
        )
        (options.out / "lm.json").write_text(
            json.dumps({"rounds": options.rounds, "lines": lines, "samples": samples}, indent=1, default=str)
        )


if __name__ == "__main__":
    main()
