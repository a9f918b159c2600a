"""What must hold for the proof of client-level privacy, as one pure function over plain facts of a run.

Each condition names a step of the derivation in docs/differential-privacy.md that would no longer be true.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedmerge.core.errors import UsageError


@dataclass(frozen=True)
class Facts:
    """What the conditions need to know of a run.

    Attributes:
        sampling: How cohorts are drawn.
        fraction: The run's share of clients in a cohort.
        sampling_rate: What the method believes that share to be.
        quorum: Replies, or their share, below which a round is abandoned.
        select: How the reported round is chosen.
        merging: In which space adapters are averaged.
        adapters: Whether what travels holds LoRA factors.
        buffers: Numbers in buffers that would travel.
        clip_to_median: Whether updates are cut to a multiple of the clients' median.
        cap_to_median: Whether numbers of examples are.
        denominator: ``public``, or what else the sums are divided by.
        silent_rounds: Whether a round without replies releases noise as any other.
        early_stop: Whether training may end before its last round for how the clients do.
        search: Whether the number of models or their start is looked for in the clients' updates.
        coupled_rows: Whether a client's merging weights depend on other clients' updates.
        finetune: Whether clients train on by themselves afterwards, which needs no protection.
    """

    sampling: str = "poisson"
    fraction: float = 1.0
    sampling_rate: float = 1.0
    quorum: float = 0.0
    select: str = "last"
    merging: str = "factors"
    adapters: bool = False
    buffers: int = 0
    clip_to_median: bool = False
    cap_to_median: bool = False
    denominator: str = "public"
    silent_rounds: bool = True
    early_stop: bool = False
    search: bool = False
    coupled_rows: bool = False
    finetune: bool = False


def faults(facts: Facts) -> list[str]:
    """Every reason why the claimed epsilon would not hold, one text each; empty if it does."""
    return [*_faults_of_sampling(facts), *_faults_of_the_sum(facts), *_faults_of_what_is_reported(facts)]


def refuse(facts: Facts) -> None:
    """Raises UsageError with all `faults` if there is one."""
    found = faults(facts)
    if found:
        raise UsageError("\n".join(found))


def _faults_of_sampling(facts: Facts) -> list[str]:
    found = []
    if facts.sampling != "poisson" and not facts.fraction >= 1:
        found.append(
            f"participation.sampling: got {facts.sampling!r}; expected 'poisson': the accountant counts on each client "
            "being drawn independently of all others. Set participation.sampling='poisson', or fraction=1"
        )
    if facts.sampling_rate != facts.fraction:
        found.append(
            f"method.sampling_rate: got {facts.sampling_rate:g} with fraction={facts.fraction:g}; expected the same: "
            "epsilon and the public denominator are computed from it. Set both alike"
        )
    if not facts.quorum <= 0:
        found.append(
            f"participation.quorum: got {facts.quorum:g}; expected 0: whether a round is abandoned would tell how many "
            "clients answered. Set participation.quorum=0"
        )
    if not facts.silent_rounds:
        found.append(
            "participation: got rounds that are left out if nobody answers; expected noise in those as well: a model "
            "that stands still would tell that nobody took part"
        )
    return found


def _faults_of_the_sum(facts: Facts) -> list[str]:
    found = []
    if facts.merging == "product" or (facts.merging == "auto" and facts.adapters):
        found.append(
            f"merging: got {facts.merging!r}; expected 'factors': averages of products are computed from the clients' "
            "updates beside the noisy sum. Set merging='factors'"
        )
    if facts.buffers != 0:
        found.append(
            f"model: got a network with {facts.buffers} numbers in buffers (BatchNorm statistics); expected none: they "
            "would be averaged without clipping and noise. Use GroupNorm, or no normalisation"
        )
    if facts.clip_to_median:
        found.append(
            "defences.clip: got a limit computed from the clients' updates; expected 0: one client would move the "
            "limit for all others, and method.clip bounds every update already. Set defences.clip=0"
        )
    if facts.cap_to_median:
        found.append(
            "defences.max_count: got a limit computed from the clients' numbers of examples; expected 0: one client "
            "would move the limit for all others. Set defences.max_count=0, and method.count_cap to a public number"
        )
    if facts.denominator != "public":
        found.append(
            f"denominator: got {facts.denominator!r}; expected 'public': divided by what the clients of a round add up "
            "to, one client changes the result by far more than clip/denominator"
        )
    return found


def _faults_of_what_is_reported(facts: Facts) -> list[str]:
    found = []
    if facts.select != "last":
        found.append(
            f"select: got {facts.select!r}; expected 'last': the choice of a round looks at the clients' own examples, "
            "without noise. Set select='last'"
        )
    if facts.early_stop:
        found.append(
            "early stop: got one; expected a fixed number of rounds: when training ends would tell how the clients do"
        )
    if facts.search:
        found.append(
            "method: got a search for structure in the clients' updates; expected a fixed number of models that start "
            "from public draws: the search has no noise. Use method 'dp-fedmerge'"
        )
    if facts.coupled_rows:
        found.append(
            "method: got merging weights that depend on other clients' updates; expected a step of each row by its own "
            "client's update and the released models only. Use method 'dp-fedmerge'"
        )
    return found
