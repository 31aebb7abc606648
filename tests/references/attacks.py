"""Attacks and adversarial training re-derived from the papers in plain torch, sharing no code with the package."""

import torch
import torch.nn.functional as F


def input_gradient(model, x, y):
    x = x.clone().requires_grad_(True)
    F.cross_entropy(model(x), y, reduction="sum").backward()
    return x.grad


def pgd_linf(model, x0, y, eps, step, steps):
    """Madry et al. (2018): x ← clip(x + α sign ∇L), from x0 itself."""
    x = x0.clone()
    for _ in range(steps):
        x = x + step * input_gradient(model, x, y).sign()
        x = torch.minimum(torch.maximum(x, x0 - eps), x0 + eps).clamp(0, 1)
    return x


def pgd_l2(model, x0, y, eps, step, steps):
    """x ← Π(x + α ∇L / ‖∇L‖), the projection by torch.renorm, then the box."""
    x = x0.clone()
    for _ in range(steps):
        g = input_gradient(model, x, y)
        x = x + step * g / g.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        x = (x0 + torch.renorm(x - x0, p=2, dim=0, maxnorm=eps)).clamp(0, 1)
    return x


def energy_fgsm(model, x0, y, eps):
    """JEAT eq. 18: x + ε sign ∇E(x, y), E(x, y) = -f(x)[y]."""
    x = x0.clone().requires_grad_(True)
    (-model(x)[torch.arange(len(y)), y]).sum().backward()
    return (x0 + eps * x.grad.sign()).clamp(0, 1)


def sample(model, x0, y, step, steps, subtract_marginal):
    """CEM eq. 7 (with the marginal's gradient subtracted: TA) or section 4.1 (without: CS), unit steps, box."""
    x = x0.clone()
    for _ in range(steps):
        v = x.clone().requires_grad_(True)
        logits = model(v)
        score = logits[torch.arange(len(y)), y]
        if subtract_marginal:
            score = score - torch.log(torch.exp(logits).sum(1))
        g = torch.autograd.grad(score.sum(), v)[0]
        x = (x + step * g / g.flatten(1).norm(dim=1).view(-1, 1, 1, 1)).clamp(0, 1)
    return x
