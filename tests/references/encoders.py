"""Samplers of encoders re-derived from CEM's equations pair by pair, sharing no code with the package."""

import math

import torch


def alike(a, b, tau):
    """f(x, z) = cos(a, b) / tau of two vectors."""
    return (a * b).sum() / (a.pow(2).sum().sqrt() * b.pow(2).sum().sqrt()) / tau


def log_sum_exp(values):
    top = max(v.item() for v in values)
    return top + torch.log(sum(torch.exp(v - top) for v in values))


def climb(x, score, step, steps):
    """x ← clip(x + step · g / |g|), g the gradient of a scalar of the whole batch."""
    for _ in range(steps):
        v = x.clone().requires_grad_(True)
        (g,) = torch.autograd.grad(score(v), v)
        lengths = torch.stack([row.pow(2).sum().sqrt() for row in g])
        x = (x + step * g / lengths.view(-1, 1, 1, 1)).clamp(0, 1)
    return x


def np_langevin(encode, x, negatives, tau, step, steps):
    """CEM eq. 10 without its noise: up log Σ_k exp f(x, z_k)."""
    score = lambda v: sum(log_sum_exp([alike(z, n, tau) for n in negatives]) for z in encode(v))
    return climb(x, score, step, steps)


def np_pgd(encode, x, negatives, tau, step, steps):
    """CEM eq. 11: up log Σ_k exp f(x, z_k) - f(x, z), z the representation of where x started."""
    with torch.no_grad():
        anchors = encode(x)

    def score(v):
        pairs = zip(encode(v), anchors, strict=True)
        return sum(log_sum_exp([alike(z, n, tau) for n in negatives]) - alike(z, a, tau) for z, a in pairs)

    return climb(x, score, step, steps)


def entropy(features, tau):
    """Of a batch, estimated by similarities: -1/N Σ_i log (1/(N-1)) Σ_{j≠i} exp f(x_i, x_j)."""
    count = len(features)
    rows = [[alike(features[i], features[j], tau) for j in range(count) if j != i] for i in range(count)]
    return -sum(log_sum_exp(row) - math.log(count - 1) for row in rows) / count


def maxent(encode, x, tau, step, steps):
    """Up the entropy of the batch."""
    return climb(x, lambda v: entropy(encode(v), tau), step, steps)


def nearest(train, labels, test, k):
    """The class that most of the k nearest training features by cosine have; of several the smallest number."""
    found = []
    for z in test:
        near = sorted(range(len(train)), key=lambda i: -alike(z, train[i], 1.0).item())[:k]
        votes = [labels[i].item() for i in near]
        found.append(min(set(votes), key=lambda v: (-votes.count(v), v)))
    return torch.tensor(found)
