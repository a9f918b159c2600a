"""FedALA: its limit, one step of the merging weights by hand, and when they are learnt."""

import pytest
import torch

from fedmerge.algorithms.fedala import Adapting, FedAla
from fedmerge.algorithms.fedavg import FedAvg
from fedmerge.core.errors import UsageError
from fedmerge.core.protocol import Slope
from fedmerge.runtime import run_round
from fedmerge.training import ModuleTask
from small_federation import small

CLOSE = {"rtol": 1e-12, "atol": 1e-12}
YES, NO = torch.tensor(True), torch.tensor(False)


def of(federation):
    return ModuleTask(federation.network(), federation.layout, federation.descent)


@pytest.mark.parametrize("algorithm", [FedAla(ala_lr=0.0), FedAla(layers=0)], ids=["rate 0", "no layers"])
def test_with_weights_that_stay_at_one_it_is_fedavg(algorithm):
    adapted, _ = small().play(algorithm, 3)
    averaged, _ = small().play(FedAvg(), 3)
    torch.testing.assert_close(adapted.models, averaged.models, **CLOSE)


def test_the_first_round_is_fedavgs_because_nobody_has_a_model_of_its_own():
    adapted, averaged = (small().play(algorithm, 1)[0] for algorithm in (FedAla(), FedAvg()))
    torch.testing.assert_close(adapted.models, averaged.models, **CLOSE)
    adapted, averaged = (small().play(algorithm, 2)[0] for algorithm in (FedAla(), FedAvg()))
    assert (adapted.models - averaged.models).abs().max() > 1e-4


def test_a_step_of_the_weights_by_hand():
    """The slope on w is that on the merged number times (received − own): 1 − ala_lr · g · (received − own)."""
    federation, algorithm = small(), FedAla(ala_lr=0.3, sample=0.25, first_passes=1)
    task, batches = of(federation), federation.batches([1], 1)[0]  # 4 steps, so the sample is 1
    down, own = federation.draw(0), federation.draw(1)
    local = Adapting(own, torch.full_like(own, 0.6), YES, YES)
    head = torch.arange(57) >= 36
    merged = torch.where(head, own + 0.6 * (down - own), down)
    slope = task.gradient(merged, batches[0]).gradient * (down - own)
    expected = torch.where(head, (0.6 - 0.3 * slope).clamp(0, 1), torch.full_like(own, 0.6))
    _, after = algorithm.train(down, local, batches, task)
    torch.testing.assert_close(after.weights, expected, **CLOSE)
    found = algorithm.personal(down, local, batches[:1], task)
    torch.testing.assert_close(found, torch.where(head, own + expected * (down - own), down), **CLOSE)


def test_before_use_the_weights_learn_on_all_batches_of_the_pass():
    federation, algorithm = small(), FedAla(ala_lr=0.3, sample=0.25, first_passes=1)
    task, batches = of(federation), federation.batches([1], 1)[0]
    local = Adapting(federation.draw(1), torch.full_like(federation.draw(1), 0.6), YES, YES)
    whole = FedAla(ala_lr=0.3, sample=1.0, first_passes=1)
    found, wanted = (method.personal(federation.draw(0), local, batches, task) for method in (algorithm, whole))
    assert torch.equal(found, wanted)
    _, sampled = algorithm.train(federation.draw(0), local, batches, task)
    _, all_of_it = whole.train(federation.draw(0), local, batches, task)
    assert not torch.equal(sampled.weights, all_of_it.weights)


def test_weights_end_at_their_bounds_under_a_large_rate():
    federation, algorithm = small(), FedAla(ala_lr=1e6, sample=1.0)
    _, fleet = federation.play(algorithm, 2)
    head = fleet.private[0].weights[36:]
    assert bool(((head == 0) | (head == 1)).all())
    assert bool((fleet.private[0].weights[:36] == 1).all())


def passes_done(local, **options):
    """How often the weights were moved, told from a slope that is the same everywhere."""
    federation, algorithm = small(), FedAla(ala_lr=0.01, sample=0.5, **options)
    batches = federation.batches([1], 1)[0]  # 4 steps: 2 in the sample

    class Counting:
        layout = federation.layout

        def gradient(self, params, batch):
            return Slope(params.sum(), torch.ones_like(params), params[:0])

    down = torch.ones(57, dtype=torch.float64)
    weights = algorithm._learnt(down, local._replace(model=torch.zeros_like(down)), batches, as_task(Counting()), 0.5)
    return round(float(1 - weights[-1]) / 0.01) / 2


def as_task(task):
    """Fills in what the protocol asks for and the test does not use."""
    for name in ("slope_through", "features", "predict", "losses", "right", "loss", "train", "descend"):
        setattr(task, name, task.gradient)
    return task


@pytest.mark.parametrize(
    ("joined", "learnt", "expected"), [(NO, NO, 0), (YES, NO, 4), (YES, YES, 2)], ids=["new", "first time", "later"]
)
def test_the_first_learning_is_longer(joined, learnt, expected):
    """The first learning is in a client's second round: in its first there is nothing to merge."""
    local = FedAla().start(small().draw(0))._replace(joined=joined, learnt=learnt)
    assert passes_done(local, passes=2, first_passes=4) == expected


def test_a_client_that_joins_late_starts_from_what_it_receives():
    federation, algorithm = small(), FedAla()
    state, fleet = federation.begin(algorithm)
    for r, members in enumerate([[0, 1], [0, 5]], start=1):
        cohort = torch.tensor(members)
        result = run_round(
            algorithm,
            state,
            fleet,
            cohort,
            federation.batches(members, r),
            federation.counts[cohort],
            federation.engine(),
        )
        received, (state, fleet) = state.models[0], (result.state, result.fleet)
    late = fleet.private[5]
    torch.testing.assert_close(late.model, of(federation).train(received, federation.batches([5], 2)[0]), **CLOSE)
    assert bool((late.weights == 1).all())
    assert [bool(fleet.private[i].learnt) for i in (0, 1, 5)] == [True, False, False]


def test_fewer_first_passes_than_later_ones_are_refused():
    with pytest.raises(UsageError, match="first_passes: got 1 with passes = 2; expected at least as many"):
        FedAla(passes=2, first_passes=1)


def test_more_layers_than_there_are_are_refused():
    with pytest.raises(UsageError, match=r"fedala.layers: got 3 layers; this network has 2"):
        small().begin(FedAla(layers=3))
