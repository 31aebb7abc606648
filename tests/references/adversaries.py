"""APGD, FAB and the bumps of the l2 square attack re-derived, point by point, sharing no code with the package."""

import torch
import torch.nn.functional as F


def loss(logits, y, kind, t):
    i = torch.arange(len(y))
    z = logits.sort(1, descending=True).values
    if kind == "cross-entropy":
        return F.cross_entropy(logits, y, reduction="none")
    if kind == "dlr":
        others = logits.clone()
        others[i, y] = -torch.inf
        return -(logits[i, y] - others.max(1).values) / (z[:, 0] - z[:, 2] + 1e-12)
    return -(logits[i, y] - logits[i, t]) / (z[:, 0] - 0.5 * (z[:, 2] + z[:, 3]) + 1e-12)


def target(model, x, y, rank):
    """The class of that rank among all classes, where the first is the label itself."""
    return model(x).sort(1, descending=True).indices[:, rank]


def inside(x, origin, eps, norm):
    move = x - origin
    move = move.clamp(-eps, eps) if norm == "linf" else move * min(1.0, eps / max(move.norm().item(), 1e-12))
    return (origin + move).clamp(0, 1)


def apgd(model, x, y, eps, norm, steps, kind, targets, generator):
    """Which points break in runs towards the targets, and the best losses of the first run."""
    broken, first = torch.zeros(len(x), dtype=torch.bool), None
    for rank in range(1, targets + 1) if kind == "targeted-dlr" else [1]:
        left = (~broken).nonzero().flatten()
        if len(left) == 0:
            break
        shape = x[left].shape
        if norm == "linf":
            noise = 2 * torch.rand(shape, generator=generator, dtype=x.dtype) - 1
            noise = noise / noise.flatten(1).abs().max(1).values.view(-1, 1, 1, 1)
        else:
            noise = torch.randn(shape, generator=generator, dtype=x.dtype)
            noise = noise / noise.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        t = target(model, x, y, rank)
        results = [_one(model, x[i], y[i], t[i], eps, norm, steps, kind, noise[j]) for j, i in enumerate(left)]
        broken[left] = torch.tensor([r[0] for r in results])
        first = torch.stack([r[1] for r in results]) if first is None else first
    return broken, first


def _one(model, x, y, t, eps, norm, steps, kind, noise):
    """Algorithm 1 of Croce and Hein (2020) on one image; the checkpoints as they give them for 100 steps, scaled."""

    def look(z):
        z = z.clone().requires_grad_()
        out = model(z[None])
        value = loss(out, y[None], kind, t[None])[0]
        (gradient,) = torch.autograd.grad(value, z)
        return value.detach(), gradient, out.argmax().item() != y.item()

    def step(z, gradient, size):
        direction = gradient.sign() if norm == "linf" else gradient / gradient.norm()
        return inside(z + size * direction, x, eps, norm)

    here = inside(x + eps * noise, x, eps, norm)
    value, gradient, over = look(here)
    best, best_value, best_gradient = here, value, gradient
    size, previous, values, flags = 2 * eps, here, [value], [over]
    length, last, halved, best_then = max(int(0.22 * steps), 1), 0, True, value
    for k in range(1, steps + 1):
        share = 1.0 if k == 1 else 0.75
        z = step(here, gradient, size)
        z = inside(here + share * (z - here) + (1 - share) * (here - previous), x, eps, norm)
        previous, here = here, z
        value, gradient, over = look(here)
        values.append(value)
        flags.append(over)
        if value > best_value:
            best, best_value, best_gradient = here, value, gradient
        if k - last == length:
            rises = sum(bool(values[j] > values[j - 1]) for j in range(last + 1, k + 1))
            reduce = rises <= 0.75 * length or (not halved and best_then >= best_value)
            if reduce:
                size, here, gradient = size / 2, best, best_gradient
            halved, best_then, last = reduce, best_value, k
            length = max(length - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1))
    return any(flags), best_value


def project(x, w, gap):
    """The smallest linf move with w·move = gap inside the box, by bisection on its size."""
    room = torch.where((w * gap) > 0, 1 - x, x)
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if (w.abs() * room.clamp_max(middle)).sum() < gap.abs() else (low, middle)
    return room.clamp_max(high) * w.sign() * gap.sign()


def fab(model, x, y, steps, targets):
    """The smallest linf distance of a misclassified point that targeted FAB meets, for each image."""
    shortest = torch.full((len(x),), torch.inf, dtype=x.dtype)
    for i in range(len(x)):
        for rank in range(1, targets + 1):
            t = target(model, x[i : i + 1], y[i : i + 1], rank)[0]
            z = x[i]
            for _ in range(steps):
                v = z.clone().requires_grad_()
                out = model(v[None])[0]
                difference = out[t] - out[y[i]]
                (w,) = torch.autograd.grad(difference, v)
                w, difference = w.flatten(), difference.detach()
                here = project(z.flatten(), w, -difference)
                home = project(x[i].flatten(), w, w @ (z - x[i]).flatten() - difference)
                a, b = here.abs().max().clamp_min(1e-8), home.abs().max().clamp_min(1e-8)
                alpha = min(a / (a + b), torch.tensor(0.1))
                ahead = (1 - alpha) * (z.flatten() + 1.05 * here) + alpha * (x[i].flatten() + 1.05 * home)
                z = ahead.clamp(0, 1).view_as(z)
                if model(z[None]).argmax() != y[i]:
                    shortest[i] = min(shortest[i], (z - x[i]).abs().max())
                    z = x[i] + 0.9 * (z - x[i])
    return shortest


def bump(size):
    """Nested rectangles, each weighing 1 / (ring + 1)², positive in the upper and negative in the lower half."""

    def rings(height, width):
        out = torch.zeros(height, width)
        row, column = height // 2, width // 2
        for ring in range(max(row, column) + 1):
            out[max(row - ring, 0) : row + ring + 1, max(column - ring, 0) : column + ring + 1] += 1 / (ring + 1) ** 2
        return out / out.norm() if height else out

    pattern = torch.cat([rings(size // 2, size), -rings(size - size // 2, size)])
    return pattern / pattern.norm()


def two_windows(best, x, size, eps, generator):
    """A move of the l2 square attack, image by image and channel by channel, from the draws of the same generator."""
    size = max(size, 3)
    size = min(size + 1 - size % 2, best.shape[2])
    place = lambda: [int(torch.randint(0, best.shape[2] - size + 1, (), generator=generator)) for _ in range(2)]
    (r1, c1), (r2, c2) = place(), place()
    pattern = bump(size)
    pattern = pattern.T if torch.rand((), generator=generator) > 0.5 else pattern
    signs = 2.0 * torch.randint(0, 2, (len(x), x.shape[1], 1, 1), generator=generator) - 1
    out = torch.empty_like(x)
    for i in range(len(x)):
        delta = best[i] - x[i]
        free = max(eps**2 - (delta**2).sum().item(), 0.0) / x.shape[1]
        moved = delta.clone()
        moved[:, r2 : r2 + size, c2 : c2 + size] = 0
        for c in range(x.shape[1]):
            window = delta[c, r1 : r1 + size, c1 : c1 + size]
            other = delta[c, r2 : r2 + size, c2 : c2 + size]
            common = delta[c, max(r1, r2) : min(r1, r2) + size, max(c1, c2) : min(c1, c2) + size]
            budget = (window**2).sum() + (other**2).sum() - (common**2).sum() + free
            new = pattern * signs[i, c] + window / max(window.norm().item(), 1e-12)
            moved[c, r1 : r1 + size, c1 : c1 + size] = new / new.norm() * budget.sqrt()
        out[i] = (x[i] + moved / moved.norm() * eps).clamp(0, 1)
    return out
