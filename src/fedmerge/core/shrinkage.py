"""How far each model's own update may leave the common one (positive-part James-Stein)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from fedmerge.core.sums import inner_products, squared_norms, weighted_sum


def shrunk_updates(
    updates: Float[Tensor, "C P"],
    share: Float[Tensor, "C d"],
    proportions: Float[Tensor, " C"],
    *,
    strength: float,
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

    Returns:
        [d, P] in float64.
    """
    own = weighted_sum(share, updates)
    if strength == 0 or share.shape[1] == 1:
        return own
    common = weighted_sum(proportions[:, None], updates)
    spread = squared_norms(updates)[:, None] - 2 * inner_products(updates, own) + squared_norms(own)[None, :]
    room = 1 - share.square().sum(dim=0)
    # A model with one client has no spread to measure (0/0): it follows that client.
    variance = torch.where(room > 1e-9, (share * spread.clamp_min(0)).sum(dim=0) / room.clamp_min(1e-9), 0.0)
    chance = variance * (share - proportions[:, None]).square().sum(dim=0)
    distance = squared_norms(own - common)
    keep = (1 - strength * chance / distance.clamp_min(torch.finfo(torch.float64).tiny)).clamp_min(0)
    used = share.sum(dim=0) > 0
    return torch.where(used[:, None], common + keep[:, None] * (own - common), own)
