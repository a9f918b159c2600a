"""Your own network, on the digits that come with scikit-learn: the body of `main` is all there is to write.

From Python:       python examples/own_module.py
From the shell:    fedmerge run model=import model.path=examples/own_module.py:TinyNet rounds=30

Any nn.Module will do, BatchNorm and frozen layers included: give an instance, or a class or function that is called
without arguments. The shell form calls it with what its signature takes of ``input_shape`` and ``num_classes``, and
with your own keywords, for example ``model.options.width=12``.
"""

from __future__ import annotations

from torch import Tensor, nn

import fedmerge


class TinyNet(nn.Module):
    """One convolution, a maximum over halves of the image, and a linear layer."""

    def __init__(self, input_shape: tuple[int, ...] = (1, 8, 8), num_classes: int = 10, width: int = 8) -> None:
        super().__init__()
        self.features = nn.Conv2d(input_shape[0], width, 3, padding=1)
        self.pool = nn.AdaptiveMaxPool2d(4)
        self.head = nn.Linear(width * 4 * 4, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, c, h, w] to class scores [B, K]."""
        scores: Tensor = self.head(self.pool(self.features(images).relu()).flatten(1))
        return scores


def main(rounds: int = 30) -> None:
    result = fedmerge.run("digits", model=TinyNet, rounds=rounds)
    print(result.frame()[["name", "group", "num_train", "accuracy"]])
    print(f"mean accuracy {100 * result.accuracy:.1f} %")
    print("client-07 would deploy", result.client_model("client-07"))


if __name__ == "__main__":
    main()
