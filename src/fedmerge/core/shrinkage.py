"""How far each model's own update may leave the common one (positive-part James-Stein)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from fedmerge.core.sums import blocks, column_sums, squared_norms, weighted_sum


def shrunk_updates(
    updates: Float[Tensor, "C P"],
    share: Float[Tensor, "C d"],
    proportions: Float[Tensor, " C"],
    *,
    strength: float,
    squares: Float[Tensor, " C"] | None = None,
) -> Float[Tensor, "d P"]:
    """U_j ← Ū + λ_j (U_j − Ū) with λ_j = max(0, 1 − strength · v_j / ‖U_j − Ū‖²).

    U_j = Σ_i a_ij g_i is the model's own average, Ū = Σ_i m_i g_i the common one. v_j = s_j² Σ_i (a_ij − m_i)² is the
    variance that U_j − Ū would have by chance, with s_j² the spread of the replies around U_j. Where the models'
    updates differ no more than chance would make them, they move together.

    Args:
        updates: g_i.
        share: a_ij, columns summing to 1 (or 0 for a model nobody uses).
        proportions: m_i, summing to 1.
        strength: Dimensionless; 0 switches shrinkage off.
        squares: ‖g_i‖² where they are known already.

    Returns:
        [d, P] in float64.
    """
    d = share.shape[1]
    if strength == 0 or d == 1:
        return weighted_sum(share, updates)
    squares = squared_norms(updates) if squares is None else squares
    sums = torch.empty(d + 1, updates.shape[1], dtype=torch.float64, device=updates.device)  # the last row is Ū
    lengths, distance = (torch.zeros(d, dtype=torch.float64, device=updates.device) for _ in range(2))
    for columns, part in column_sums(updates, share, proportions[:, None]):
        sums[:, columns] = part
        lengths += part[:d].square().sum(dim=1)
        distance += (part[:d] - part[d:]).square().sum(dim=1)
    total = share.sum(dim=0)
    spread = share.T @ squares + (total - 2) * lengths  # = Σ_i a_ij ‖g_i − U_j‖², without the replies
    room = 1 - share.square().sum(dim=0)
    # A model with one client has no spread to measure (0/0): it follows that client.
    variance = torch.where(room > 1e-9, spread.clamp_min(0) / room.clamp_min(1e-9), 0.0)
    chance = variance * (share - proportions[:, None]).square().sum(dim=0)
    keep = (1 - strength * chance / distance.clamp_min(torch.finfo(torch.float64).tiny)).clamp_min(0)[:, None]
    for columns in blocks(updates.shape[1]):
        own, common = sums[:d, columns], sums[d:, columns]
        own.copy_(torch.where((total > 0)[:, None], common + keep * (own - common), own))
    return sums[:d]
