"""Apple's pfl: FederatedAveraging on its simulated backend, PyTorch models and datasets of tensors.

It does not shuffle a client's examples and keeps a client's batches once cut.
"""

from __future__ import annotations

from typing import Any

import torch
from pfl.aggregate.simulate import SimulatedBackend  # type: ignore[import-not-found]
from pfl.algorithm import FederatedAveraging, NNAlgorithmParams  # type: ignore[import-not-found]
from pfl.data.federated_dataset import FederatedDataset  # type: ignore[import-not-found]
from pfl.data.pytorch import PyTorchTensorDataset  # type: ignore[import-not-found]
from pfl.data.sampling import get_user_sampler  # type: ignore[import-not-found]
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams  # type: ignore[import-not-found]
from pfl.metrics import Weighted  # type: ignore[import-not-found]
from pfl.model.pytorch import PyTorchModel  # type: ignore[import-not-found]
from talk import Peer, marked_network, options, own_channel, serve
from torch import Tensor, nn
from torch.nn import functional
from workloads import Workload, federation

NEVER = 1 << 40


class WithLoss(nn.Module):
    """The network with the two methods that pfl asks for.

    Args:
        inner: The network.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy."""
        self.train()
        return functional.cross_entropy(self.inner(inputs), targets)

    @torch.no_grad()
    def metrics(self, inputs: Tensor, targets: Tensor) -> dict[str, Any]:
        """Cross-entropy and accuracy."""
        self.eval()
        outputs = self.inner(inputs)
        loss = functional.cross_entropy(outputs, targets, reduction="sum").item()
        right = (outputs.argmax(dim=1) == targets).sum().item()
        return {"loss": Weighted(loss, len(targets)), "accuracy": Weighted(right, len(targets))}


class Pfl:
    """A run that is continued round by round."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        module = WithLoss(marked_network(workload))
        self.model = PyTorchModel(module, torch.optim.SGD, torch.optim.SGD(module.parameters(), lr=1.0))
        users = {
            i: PyTorchTensorDataset((inputs, targets), user_id=str(i))
            for i, (inputs, targets) in enumerate(federation(workload))
        }
        data = FederatedDataset(users.__getitem__, get_user_sampler("minimize_reuse", list(users)))
        self.backend = SimulatedBackend(data, data)
        self.algorithm, self.rounds = FederatedAveraging(), 0

    def play(self, evaluation_frequency: int = NEVER) -> None:
        """One round; its round 0 is always evaluated on the training clients."""
        self.rounds += 1
        params = NNAlgorithmParams(
            central_num_iterations=self.rounds,
            evaluation_frequency=evaluation_frequency,
            train_cohort_size=self.workload.played,
            val_cohort_size=0,
        )
        training = NNTrainHyperParams(
            local_batch_size=self.workload.batch,
            local_num_epochs=self.workload.epochs,
            local_learning_rate=self.workload.lr,
        )
        self.algorithm.run(params, self.backend, self.model, training, NNEvalHyperParams(self.workload.batch))


def main() -> None:
    """Serves."""
    channel, asked = own_channel(), options()
    run = Pfl(asked.workload)
    watched = (
        (type(run.model), "get_parameters", "copies"),
        (type(run.model), "set_parameters", "copies"),
        (type(run.model), "get_model_difference", "copies"),
        (type(run.model), "apply_model_update", "server"),
    )
    peer = Peer(run.play, lambda: run.play(evaluation_frequency=1), watched=watched, package="pfl")
    serve(peer, channel)


if __name__ == "__main__":
    main()
