"""Energies computed from a network's outputs.

Convention of the whole package: an energy is a ``(B,)`` tensor, low on data, ``p(x) ∝ exp(-E(x))``, known up to a
constant: compare differences between inputs of one model, never values across models.  Nothing here calls a network.

CEM = Wang et al. (2021), "Demystifying adversarial training via a unified probabilistic framework".
JEAT = Zhu et al. (2021), "Towards understanding the generative capability of adversarially robust classifiers".
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize, softplus

Logits = Callable[[Tensor], Tensor]  # images (B, C, H, W) in [0, 1] -> logits (B, K)


def joint(logits: Tensor, y: Tensor) -> Tensor:
    """Return ``E(x, y) = -f_y(x)``, nats, JEAT eq. 12, CEM eq. 2.  ``logits (B, K)``, ``y (B,)`` int64 -> ``(B,)``.

    Labels may also be shares of the classes (B, K), of which it is the mean: ``-Σ_k y_k f_k(x)``.
    """
    return -(logits * y).sum(1) if y.ndim == 2 else -logits.gather(1, y[:, None]).squeeze(1)


def marginal(logits: Tensor) -> Tensor:
    """Return ``E(x) = -log Σ_k exp f_k(x)`` in nats, JEAT eq. 12.  ``logits (B, K)`` -> ``(B,)``."""
    return -logits.logsumexp(1)


def conditional(logits: Tensor, y: Tensor) -> Tensor:
    """Return ``E(y|x) = E(x, y) - E(x) = -log p(y|x)``, the cross-entropy, JEAT eq. 13; see ``joint`` for shapes."""
    return joint(logits, y) - marginal(logits)


def similarity(z: Tensor, reference: Tensor, *, temperature: float = 1.0, cosine: bool = True) -> Tensor:
    """Return ``E(x, z) = -g(x)·z / τ`` of an encoder g, CEM eq. 3.  ``z``, ``reference`` ``(B, D)`` -> ``(B,)``.

    CEM uses the plain product (``cosine=False``); encoders trained as in SimCLR use the cosine.
    """
    if cosine:
        z, reference = normalize(z, dim=1), normalize(reference, dim=1)
    return -(z * reference).sum(1) / temperature


def similarities(z: Tensor, references: Tensor, *, temperature: float = 1.0, cosine: bool = True) -> Tensor:
    """Return all ``f(x_i, z_k) = g(x_i)·z_k / τ``, an encoder's logits.  ``(B, D)``, ``(M, D)`` -> ``(B, M)``.

    Their ``marginal`` is ``-log Σ_k exp f(x, z_k)``, the energy that Langevin dynamics descends, CEM eq. 10.
    """
    if cosine:
        z, references = normalize(z, dim=1), normalize(references, dim=1)
    return z @ references.T / temperature


def infonce(
    z: Tensor,
    positive: Tensor,
    negatives: Tensor,
    *,
    without: Tensor | None = None,
    hardness: float = 0.0,
    temperature: float = 0.5,
    cosine: bool = True,
) -> Tensor:
    """Return ``-log exp f(x, z⁺) / Σ_k exp f(x, z_k)`` in nats; the positive is one of the ``z_k``, CEM eq. 8.

    ``z``, ``positive`` ``(B, D)``, ``negatives`` ``(M, D)`` -> ``(B,)``.  Low where ``x`` is near its positive.

    Args:
        without: bool (B, M), pairs that do not count as negatives: an image and its own positive, or itself.
        hardness: β of Robinson et al. (2021) with their τ⁺ = 0: negatives get weights ``exp(β f)``, scaled to mean 1.
            As in their code, gradients also flow through the weights.  Any β > 0 biases the estimate of NP-CEM's
            gradient, CEM appendix A.1.
    """
    near = -similarity(z, positive, temperature=temperature, cosine=cosine)[:, None]
    far = similarities(z, negatives, temperature=temperature, cosine=cosine)
    if without is not None:
        far = far.masked_fill(without, -torch.inf)
    if hardness:
        weight = hardness * far
        count = far.shape[1] if without is None else (~without).sum(1, keepdim=True)
        far = far + weight - weight.logsumexp(1, keepdim=True) + torch.as_tensor(count).log().to(far)
    return torch.cat([near, far], 1).logsumexp(1) - near.squeeze(1)


def in_batch(
    z: Tensor, references: Tensor, *, hardness: float = 0.0, temperature: float = 0.5, cosine: bool = True
) -> Tensor:
    """Return ``infonce (B,)`` of B anchors; the first B of M ``references`` are their positives, the others negatives.

    ``z (B, D)``, ``references (M, D)``, M >= B.
    """
    own = torch.eye(len(z), len(references), dtype=torch.bool, device=z.device)
    positive = references[: len(z)]
    return infonce(z, positive, references, without=own, hardness=hardness, temperature=temperature, cosine=cosine)


def nt_xent(
    z: Tensor, references: Tensor, *, hardness: float = 0.0, temperature: float = 0.5, cosine: bool = True
) -> Tensor:
    """Return the NT-Xent loss ``(B,)`` of Chen et al. (2020): ``infonce`` of B/2 pairs of views as positives.

    ``z (B, D)``: the first views, then the second ones; ``references (M, D)``: these B rows, then further negatives.  A
    row is not a negative of itself.
    """
    itself = torch.eye(len(z), len(references), dtype=torch.bool, device=z.device)
    positive, without = z.roll(len(z) // 2, 0), itself | itself.roll(len(z) // 2, 0)
    return infonce(z, positive, references, without=without, hardness=hardness, temperature=temperature, cosine=cosine)


def crowding(z: Tensor, others: Tensor | None = None, *, temperature: float = 0.5, cosine: bool = True) -> Tensor:
    """Return how close each sample lies to the others: ``log Σ_{j≠i} exp f(x_i, z_j)``.  ``(B, D)`` -> ``(B,)``, B > 1.

    Descending it spreads a batch out (maximum entropy).  Each value depends on every row of ``z``.  ``others (B, D)``
    are the ``z_j``, usually ``z`` detached; None: ``z`` itself.
    """
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    logits = similarities(z, z if others is None else others, temperature=temperature, cosine=cosine)
    return logits.masked_fill(itself, -torch.inf).logsumexp(1)


def binary(logit: Tensor) -> Tensor:
    """Return ``E(x) = -f(x)`` of a critic f with ``D = σ(f)``.  ``(B,)`` or ``(B, 1)`` -> ``(B,)``."""
    return -logit.reshape(len(logit))


def logistic(data: Tensor, negatives: Tensor) -> Tensor:
    """Return mean ``-log D(x)`` of the data plus mean ``-log(1 - D(x'))`` of the negatives, D = σ(-E), in nats.

    Both arguments are energies, (N,) and (M,).  Yin et al. (2022), eq. 4 and 11; log 4 at the optimum of proposition 1.
    """
    return softplus(data).mean() + softplus(-negatives).mean()
