"""Binary adversarial training re-derived from the paper (S003), in plain torch and numpy, sharing none of the package.

``model`` maps images to the critic's f, (B, 1), and is used in the mode it comes in.
"""

import numpy as np
import torch


def ascent(model, x, steps, size, sign=1.0, radius=None):
    """S003:96, eq. 8, and eq. 7 with a ball: x + size g / |g| by rows, back into the ball, then into [0, 1].

    ``sign`` -1 goes down f, as the public code does with the data.
    """
    start = x
    for _ in range(steps):
        rows = []
        for row, origin in zip(x, start, strict=True):
            v = row.clone().requires_grad_(True)
            (g,) = torch.autograd.grad(model(v[None]).sum(), v)
            v = row + sign * size * g / g.square().sum().sqrt()
            if radius is not None and (length := (v - origin).square().sum().sqrt()) > radius:
                v = origin + (v - origin) * radius / length
            rows.append(v.clamp(0, 1))
        x = torch.stack(rows)
    return x


def ascent_direction(model, data, negatives, scaled=True):
    """Eq. 14: mean (1 - σ(f)) ∇f over data minus mean σ(f) ∇f over negatives; unscaled, eq. 2 with PGD negatives.

    ∇ is in the parameters; one tensor each.
    """
    total = [torch.zeros_like(p) for p in model.parameters()]
    for sign, images in ((1.0, data), (-1.0, negatives)):
        for x in images:
            value = model(x[None]).squeeze()
            d = 1 / (1 + torch.exp(-value.detach()))
            weight = (1 - d if sign > 0 else d) if scaled else 1.0
            gradients = torch.autograd.grad(value, list(model.parameters()))
            for out, g in zip(total, gradients, strict=True):
                out += sign * weight * g / len(images)
    return total


def growth(seen, aurocs, first, last, gate, window, per_step):
    """K of each step of a run: ``seen`` images before each step and the AUROC that it measures.

    K goes up by one before a step once the mean of the AUROCs of the last ``window`` images passes the gate, all of
    them measured at this K, or once ``per_step`` images were trained on at this K.
    """
    ks, began = [], 0
    for now, images in enumerate(seen):
        k = ks[-1] if ks else first
        at_k = images - seen[began]
        held = [a for a, s in zip(aurocs[:now], seen[:now], strict=True) if s >= max(images - window, seen[began])]
        by_gate = gate is not None and at_k >= window and np.mean(held) > gate
        by_time = per_step is not None and at_k >= per_step
        if k < last and (by_gate or by_time):
            k, began = k + 1, now
        ks.append(k)
    return ks
