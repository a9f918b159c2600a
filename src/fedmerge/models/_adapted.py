"""A pretrained network with an adapter, as a plain module from inputs to outputs."""

from __future__ import annotations

import logging

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from fedmerge.models._blocks import Memory, row_lengths

log = logging.getLogger(__name__)

_MOST_BYTES = 4 << 30
_ROWS = 32
"""Examples that the frozen part sees at a time when it is remembered."""


class Adapted(nn.Module):
    """Tokens [B, L] (or images [B, c, h, w]) to outputs [B, K], or [B, l, K] where every token has one.

    Padding is −1 and stands at the end; a batch is cut to its longest example, l ≤ L.

    Args:
        body: Pretrained network with an adapter: everything else in it is frozen.
        head: Output layer on the mean of the last hidden states; None where the body gives the outputs itself.
        pad: Token number that stands for padding inside the body.
        image: Height and width that the body takes; None for texts.
        memory: Of the frozen lower blocks; None where nothing can be remembered.
    """

    def __init__(
        self,
        body: nn.Module,
        head: nn.Module | None,
        *,
        pad: int = 0,
        image: tuple[int, int] | None = None,
        memory: Memory | None = None,
    ) -> None:
        super().__init__()
        self.body, self.head = body, head
        self.pad, self.image, self.memory = pad, image, memory

    def forward(self, inputs: Tensor) -> Tensor:
        """Outputs in float32, or float64 where the whole network is."""
        if self.image is not None:
            return self._of_images(inputs)
        inputs = inputs[:, : max(row_lengths(inputs), default=1)]
        mask = inputs >= 0
        given = None if self.memory is None else self.memory.recalled(inputs)
        if given is None or self.memory is None:
            return self._of_tokens(inputs, mask)
        with self.memory.giving(given):
            return self._of_tokens(inputs, mask)

    def _of_tokens(self, inputs: Int[Tensor, "B l"], mask: Tensor) -> Tensor:
        ids = torch.where(mask, inputs, self.pad)
        output = self.body(input_ids=ids, attention_mask=mask.long())
        if self.head is None:
            return _wide(output.logits)
        hidden = _wide(output.last_hidden_state)
        real = mask[..., None].to(hidden.dtype)
        mean = (hidden * real).sum(dim=1) / real.sum(dim=1).clamp_min(1)
        outputs: Tensor = self.head(mean)
        return outputs

    def _of_images(self, inputs: Float[Tensor, "B c h w"]) -> Tensor:
        pixels = inputs if inputs.shape[1] == 3 else inputs[:, :1].expand(-1, 3, -1, -1)
        if tuple(pixels.shape[2:]) != self.image:
            pixels = functional.interpolate(pixels, size=self.image, mode="bilinear", align_corners=False)
        return _wide(self.body(pixel_values=pixels).logits)

    @torch.no_grad()
    def remember(self, inputs: Tensor) -> None:
        """Computes what the frozen lower blocks make of each example, once for every copy of this network.

        What was remembered of other examples is forgotten. More than 4 GiB are not kept.

        Args:
            inputs: [n, L] tokens.
        """
        if self.memory is None:
            return
        new = self.memory.unknown(inputs)
        was_training = self.training
        self.eval()
        for rows in torch.split(inputs[new], _ROWS) if new else ():
            if self.memory.num_bytes > _MOST_BYTES:
                log.warning("frozen blocks are computed anew for some examples: more than 4 GiB would be kept")
                break
            cut, noted = rows[:, : max(row_lengths(rows))], list[Tensor]()
            with self.memory.noting(noted):
                self._of_tokens(cut, cut >= 0)
            self.memory.learn(cut, noted[0])
        self.train(was_training)

    @torch.no_grad()
    def complete(self, prompt: list[int], most: int, stop: int | None) -> list[int]:
        """Greedy continuation of a prompt, for networks that give every token an output.

        Args:
            prompt: Token numbers.
            most: New tokens at most.
            stop: Token that ends the text.
        """
        tokens = list(prompt)
        for _ in range(most):
            best = int(self(torch.tensor([tokens]))[0, -1].argmax())
            if best == stop:
                break
            tokens.append(best)
        return tokens[len(prompt) :]


def _wide(values: Tensor) -> Tensor:
    """In float32 at least."""
    return values if values.dtype == torch.float64 else values.float()
