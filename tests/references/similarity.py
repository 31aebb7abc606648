"""SSIM re-derived place by place, Wang et al. (2004)."""

import numpy as np


def ssim(a, b):
    """Of two images (C, H, W) in [0, 1]: 11x11 Gaussian windows of deviation 1.5, or the largest odd that fits."""
    size = min(11, a.shape[1], a.shape[2])
    size = size if size % 2 else size - 1
    r = np.arange(size) - size // 2
    w = np.exp(-(r[:, None] ** 2 + r[None] ** 2) / (2 * 1.5**2))
    w /= w.sum()
    values = []
    for c in range(a.shape[0]):
        for i in range(a.shape[1] - size + 1):
            for j in range(a.shape[2] - size + 1):
                p, q = a[c, i : i + size, j : j + size], b[c, i : i + size, j : j + size]
                m, n = (w * p).sum(), (w * q).sum()
                v, u, s = (w * (p - m) ** 2).sum(), (w * (q - n) ** 2).sum(), (w * (p - m) * (q - n)).sum()
                values.append((2 * m * n + 1e-4) * (2 * s + 9e-4) / ((m * m + n * n + 1e-4) * (v + u + 9e-4)))
    return np.mean(values)
