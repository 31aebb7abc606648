"""Fréchet and kernel distances re-derived: matrix square root by scipy, kernel sums by loops."""

import numpy as np
import scipy.linalg


def frechet(a, b):
    return frechet_of_gaussians(a.mean(0), np.cov(a, rowvar=False), b.mean(0), np.cov(b, rowvar=False))


def frechet_of_gaussians(mean_a, cov_a, mean_b, cov_b):
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    return ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root)


def kernel(a, b):
    k = lambda u, v: (u @ v / len(u) + 1) ** 3
    m, n = len(a), len(b)
    aa = sum(k(a[i], a[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    bb = sum(k(b[i], b[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    ab = sum(k(u, v) for u in a for v in b) / (m * n)
    return aa + bb - 2 * ab
