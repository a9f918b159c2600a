"""FedMerge (arXiv:2504.06768) in 100 lines of plain torch, with the default rule and the numbers of the library.

N clients, d shared models Θ [d, P], logits W [N, d], merging weights A = softmax of each row of W. In a round client i
receives one merged model θ_i = Σ_j A_ij Θ_j, trains it, and replies with g_i = θ_i before − after. From the g_i the
server learns Θ and A, and after three rounds how many models there should be. Run it: digits, seen from four sides.
"""

import itertools
import zlib

import numpy as np
import torch
from scipy.cluster.hierarchy import fcluster, ward
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize, one_hot
from torch.nn.utils import parameters_to_vector, vector_to_parameters

Client = tuple[Tensor, Tensor, Tensor, Tensor]  # train inputs and labels, test inputs and labels
SEARCH, GATE, ELBOW, REAL, MOST = 3, 0.12, 2.5, 3.0, 15  # rounds of search; when there is structure, and how much
STEP, DECAY, SHRINKAGE, MOMENTUM, PROXIMAL = 0.2, 0.02, 0.3, 0.5, 0.01

def replies(net: nn.Module, theta: Tensor, clients: list[Client], t: int, seed: int, proximal: float = 0.0) -> Tensor:
    """g_i = θ_i before − after two epochs of local SGD on loss + proximal · ‖θ − θ_i‖², [N, P]."""
    after = []
    for i, (start, (x, y, *_)) in enumerate(zip(theta, clients, strict=True)):
        rng, moving = np.random.default_rng([seed, zlib.crc32(b"batches"), t, i]), start
        epochs = [rng.permutation(len(y)) for _ in range(2)]
        for batch in [rows for epoch in epochs for rows in np.split(epoch, range(32, len(y), 32))]:
            vector_to_parameters(moving, net.parameters())
            slope = torch.autograd.grad(cross_entropy(net(x[batch]), y[batch]), list(net.parameters()))
            moving = moving - 0.1 * (parameters_to_vector(slope) + 2 * proximal * (moving - start))
        after.append(moving)
    return theta - torch.stack(after)

def how_many(costs: np.ndarray) -> int:
    """d: the sharpest elbow of F(k), by what factor the merge that leaves k − 1 groups is dearer than those before."""
    n = len(costs) + 1
    jump = {k: costs[n - k] / costs[: n - k].mean() for k in range(2, min(MOST, n - 2) + 2)}
    drop = {k: jump[k] / jump[k + 1] for k in list(jump)[:-1]}
    sharpest = max(drop, key=lambda k: drop[k])
    real = itertools.takewhile(lambda k: jump[k] > REAL, drop)  # no elbow: as many as are dear without a gap
    return sharpest if drop[sharpest] >= ELBOW else max(2, *real, 2)

def groups_of(h: Tensor) -> Tensor:
    """Who belongs together by the progress h [N, P] of the first rounds: one group where all pull alike, else d."""
    unit = normalize(h, eps=0)
    cosines = (unit @ unit.T)[~torch.eye(len(h), dtype=torch.bool)]
    if len(h) < 4 or cosines.std(correction=0) < GATE:
        return torch.zeros(len(h), dtype=torch.int64)
    tree = ward(normalize(unit - unit.mean(0), eps=0).numpy())
    label = fcluster(tree, how_many(tree[:, 2] ** 2 / 2), "maxclust").tolist()
    return torch.tensor([list(dict.fromkeys(label)).index(own) for own in label])  # numbered as they first appear

def turned(W: Tensor, Theta: Tensor, g: Tensor) -> Tensor:
    """Mirror descent on every client's own weights: away from the models that its reply points away from."""
    centred = Theta - Theta.mean(0)
    q = g @ centred.T  # ⟨Θ_j, g_i⟩; less its mean under A it is the slope ⟨Θ_j − θ_i, g_i⟩
    q = q - (W.softmax(1) * q).sum(1, keepdim=True)
    largest, reach = q.abs().amax(1, keepdim=True), g.norm(dim=1, keepdim=True) * centred.norm(dim=1).max()
    return torch.where(largest > 1e-6 * reach, (1 - DECAY) * (W - STEP * q / largest), W)  # below: rounding noise

def update(A: Tensor, g: Tensor, p: Tensor) -> Tensor:
    """U_j = Σ_i a_ij g_i [d, P], pulled towards the common update as far as chance explains that they differ."""
    a = A * p[:, None] / (p @ A)  # how much client i counts in model j; columns sum to 1
    own, common = a.T @ g, p @ g
    variance = (a * torch.cdist(g, own, compute_mode="donot_use_mm_for_euclid_dist") ** 2).sum(0) / (1 - (a**2).sum(0))
    chance = variance * ((a - p[:, None]) ** 2).sum(0)
    keep = (1 - SHRINKAGE * chance / ((own - common) ** 2).sum(1)).clamp(min=0)  # positive-part James-Stein
    return common + keep[:, None] * (own - common)

def run(clients: list[Client], net: nn.Module, rounds: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """FedMerge in float64 from the weights of `net`: the models Θ [d, P] and the logits W [N, d]; A @ Θ is used."""
    p = torch.tensor([len(y) for _, y, *_ in clients], dtype=torch.float64)
    p, Theta, W = p / p.sum(), parameters_to_vector(net.parameters()).detach()[None], torch.zeros(len(p), 1).double()
    velocity, h = torch.zeros_like(Theta), torch.zeros(len(p), Theta.shape[1]).double()
    for t in range(1, rounds + 1):
        g = replies(net, W.softmax(1) @ Theta, clients, t, seed, PROXIMAL)
        W = turned(W, Theta, g)
        velocity = MOMENTUM * velocity + (update(W.softmax(1), g, p) if len(Theta) > 1 else p[None] @ g)
        Theta, h = Theta - velocity, h + g
        if t == SEARCH and (group := groups_of(h)).any():  # split: each group's model goes as far as the group pulled
            W = one_hot(group).double()
            Theta, velocity = Theta - ((W / W.sum(0)).T @ h - h.mean(0)), velocity.repeat(W.shape[1], 1)
    return Theta, W

def baseline(clients: list[Client], net: nn.Module, share: Tensor, rounds: int, seed: int = 0) -> Tensor:
    """Every client's model [N, P] after θ_i ← θ_i − Σ_k share_ik g_k. Rows p: FedAvg. The identity: Local."""
    theta = parameters_to_vector(net.parameters()).detach().repeat(len(clients), 1)
    for t in range(1, rounds + 1):
        theta = theta - share @ replies(net, theta, clients, t, seed)
    return theta

def accuracy(net: nn.Module, theta: Tensor, clients: list[Client]) -> list[float]:
    """Share of right answers of every client's model on the client's own test examples."""
    ...
