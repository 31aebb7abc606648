"""Contrastive losses, their gradients, LARS, re-derived sum by sum from the papers, sharing none with the package.

CEM: lines of the workshop paper's equations.  Everything in float64; encodings are rows; ``tau`` divides products.
"""

import math

import torch


def product(a, b, cosine):
    """g(x)·g(x'), of the directions for a cosine."""
    return (a @ b) / (a.norm() * b.norm()) if cosine else a @ b


def nt_xent(first, second, tau, others=(), beta=0.0, cosine=True):
    """Chen et al. (2020), algorithm 1: mean over both views of -log exp s_ij over Σ_{k≠i} exp s_ik; and ``others``."""
    rows, n = [*first, *second], len(first)
    total = 0.0
    for i, z in enumerate(rows):
        j = i + n if i < n else i - n
        far = [rows[k] for k in range(2 * n) if k not in (i, j)] + list(others)
        total = total + one(z, rows[j], far, tau, beta, cosine)
    return total / (2 * n)


def infonce(anchors, z, tau, others=(), beta=0.0, cosine=True):
    """CEM eq. 8: mean of -log exp f(x_i, z_i) / Σ_k exp f(x_i, z_k), z_i among the z_k; z as it comes."""
    total = 0.0
    for i, anchor in enumerate(anchors):
        far = [z[k] for k in range(len(z)) if k != i] + list(others)
        total = total + one(anchor, z[i], far, tau, beta, cosine)
    return total / len(anchors)


def one(anchor, positive, far, tau, beta, cosine):
    """-log of a positive's share; with β the sum over negatives is Robinson et al.'s, as their code has it (τ⁺ = 0)."""
    near = torch.exp(product(anchor, positive, cosine) / tau)
    negatives = torch.stack([torch.exp(product(anchor, z, cosine) / tau) for z in far])
    importance = negatives**beta
    return -torch.log(near / (near + (importance * negatives).sum() / importance.mean()))


def np_cem_gradient(encoder, x, z, tau, cosine):
    """CEM eq. 9 and C.4 before its last line, for parameters: mean over i of ∇f(x_i, z_i) - Σ_k w_ik ∇f(x_i, z_k).

    ``w_ik`` are self-normalised importance weights, exp f over its sum, and numbers; z are numbers.
    With adversarial x it is C.5's contrastive gradient.  ``cosine`` False is f as CEM writes it.
    """
    parameters, total = list(encoder.parameters()), None
    g = encoder(x)
    for i in range(len(x)):
        f = torch.stack([product(g[i], z[k], cosine) / tau for k in range(len(z))])
        weights = torch.exp(f.detach() - f.detach().max())
        weights = weights / weights.sum()
        grads = [torch.autograd.grad(f[k], parameters, retain_graph=True) for k in range(len(z))]
        mean = [sum(w * grad[p] for w, grad in zip(weights, grads, strict=True)) for p in range(len(parameters))]
        here = [a - b for a, b in zip(grads[i], mean, strict=True)]
        total = here if total is None else [a + b for a, b in zip(total, here, strict=True)]
    return [t / len(x) for t in total]


def posterior_divergence(clean, moved, z, tau, cosine):
    """Mean over i of Σ_k p(k|x_i) log p(k|x_i) / p(k|x̂_i), p(k|x) = exp f(x, z_k) / Σ_j exp f(x, z_j)."""
    total = 0.0
    for a, b in zip(clean, moved, strict=True):
        p, q = (torch.exp(torch.stack([product(v, other, cosine) / tau for other in z])) for v in (a, b))
        p, q = p / p.sum(), q / q.sum()
        total = total + (p * torch.log(p / q)).sum()
    return total / len(clean)


def coupled_pgd(loss, x, eps, step, steps):
    """Sign ascent on one number that all images of ``x`` share, in an linf ball and [0, 1]."""
    moved = x.clone()
    for _ in range(steps):
        v = moved.clone().requires_grad_(True)
        (g,) = torch.autograd.grad(loss(v), v)
        moved = torch.minimum(torch.maximum(moved + step * g.sign(), x - eps), x + eps).clamp(0, 1)
    return moved


def lars(w, gradients, lr, momentum, decay, trust):
    """You et al. (2017), algorithm 1, for one matrix as a list of lists and the gradients of several steps."""
    flat = [v for row in w for v in row]
    velocity = [0.0] * len(flat)
    for gradient in gradients:
        g = [v for row in gradient for v in row]
        length, slope = math.sqrt(sum(v * v for v in flat)), math.sqrt(sum(v * v for v in g))
        local = trust * length / (slope + decay * length)
        velocity = [momentum * v + lr * local * (a + decay * b) for v, a, b in zip(velocity, g, flat, strict=True)]
        flat = [a - b for a, b in zip(flat, velocity, strict=True)]
    return flat
