"""The Inception score, overlap of two sets and TensorFlow 1's resize re-derived: numpy, loops, whole matrices."""

import numpy as np


def inception_score(logits, splits):
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    scores = []
    for part in np.array_split(p, splits):
        q = part.mean(0)
        scores.append(np.exp(np.mean([sum(v * np.log(v / w) for v, w in zip(row, q, strict=True)) for row in part])))
    return np.mean(scores), np.std(scores)


def radii(features, k):
    """Distance to the k-th nearest other item, one item at a time."""
    found = []
    for i, x in enumerate(features):
        others = [np.linalg.norm(x - y) for j, y in enumerate(features) if j != i]
        found.append(sorted(others)[k - 1])
    return np.array(found)


def inside(points, centres, reach):
    """Bool (P, N): whether each point is in each ball."""
    return np.array([[np.linalg.norm(p - c) <= r for c, r in zip(centres, reach, strict=True)] for p in points])


def precision_recall(real, fake, k):
    precise = inside(fake, real, radii(real, k)).any(1).mean()
    return precise, inside(real, fake, radii(fake, k)).any(1).mean()


def density_coverage(real, fake, k):
    held = inside(fake, real, radii(real, k))
    return held.sum() / (k * len(fake)), held.any(0).mean()


def resize(x, new):
    """(H, W) -> (new, new): pixel (i, j) is looked up at (i H / new, j W / new) between its four neighbours."""
    height, width = x.shape
    out = np.empty((new, new))
    for i in range(new):
        for j in range(new):
            v, u = i * height / new, j * width / new
            top, left = int(v), int(u)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            a, b = v - top, u - left
            above = (1 - b) * x[top, left] + b * x[top, right]
            below = (1 - b) * x[bottom, left] + b * x[bottom, right]
            out[i, j] = (1 - a) * above + a * below
    return out


def scatter(shape, seed):
    """Numbers in [-0.5, 0.5) that look random and are the same with every version of everything."""
    mixed = np.arange(np.prod(shape, dtype=int), dtype=np.uint64) * np.uint64(2654435761) + np.uint64(97 * seed)
    mixed = mixed % np.uint64(2**32)
    mixed ^= mixed >> np.uint64(15)
    mixed = mixed * np.uint64(1540483477) % np.uint64(2**32)
    mixed ^= mixed >> np.uint64(13)
    return (mixed / 2**32 - 0.5).reshape(shape)


def weights(state_dict):
    """Made-up weights that keep the activations' scale from layer to layer, by name: numpy float32."""
    made = {}
    for seed, (name, old) in enumerate(sorted((n, v) for n, v in state_dict.items() if "num_batches" not in n)):
        values = scatter(tuple(old.shape), seed)
        if old.ndim > 1:
            values = values * np.sqrt(24 / np.prod(old.shape[1:]))  # variance 2 / inputs
        elif name.endswith(("bn.weight", "running_var")):
            values = 1 + values
        made[name] = values.astype(np.float32)
    return made


def bytes_of(shape, seed):
    """Made-up 8-bit images."""
    return ((scatter(shape, seed) + 0.5) * 256).astype(np.uint8)
