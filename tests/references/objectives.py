"""Training objectives re-derived from papers and what public code does, in plain torch, sharing none with the package.

Every random draw is an argument.  ``model`` maps images in [0, 1] to logits and is used in the mode it comes in; one
forward pass a batch.  Losses are batch means that keep their graph.  S000, S002: lines of the CEM and JEAT texts.
"""

import copy

import torch
import torch.nn.functional as F


def rows(values):
    """One number an image, shaped to scale a batch of images."""
    return values.view(-1, 1, 1, 1)


def joint_energy(model, x, y):
    """JEAT eq. 12: E(x, y) = -f(x)[y]."""
    return -model(x)[torch.arange(len(y)), y]


def marginal_energy(model, x):
    """JEAT eq. 12: E(x) = -log Σ_k exp f(x)[k]."""
    return -torch.logsumexp(model(x), dim=1)


def parameter_gradient(model, scalar):
    """∂ scalar / ∂ θ, one tensor a parameter in the order of ``model.parameters()``, zeros where it has no part."""
    parameters = list(model.parameters())
    found = torch.autograd.grad(scalar, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


# Adversarial training ------------------------------------------------------------------------------------------------


def at_loss(model, x_adv, y):
    """CEM eq. 6, outer part: the mean of -log p(y|x̂)."""
    return F.cross_entropy(model(x_adv), y)


def trades_search(model_eval, x0, noise_start, eps, step, steps, norm, box_first=True):
    """Zhang et al. (2019), inner maximisation of KL(p(x0) ‖ p(x)), p(x0) held fixed, from x0 + ``noise_start``.

    The start is used as it comes: the public code (noise 0.001 N) neither projects nor clips it.  linf: sign steps,
    ball, box.  l2: gradient / ‖gradient‖, its step being 2 ε / ``steps`` there; the public order is box, then renorm
    (``box_first``), the other one is that of Madry's library.  A zero gradient in l2, where the public code takes
    noise, gives nan here: the noise must not be zero.
    """
    with torch.no_grad():
        log_p = F.log_softmax(model_eval(x0), dim=1)
    x = x0 + noise_start
    for _ in range(steps):
        v = x.clone().requires_grad_(True)
        loss = (log_p.exp() * (log_p - F.log_softmax(model_eval(v), dim=1))).sum()
        g = torch.autograd.grad(loss, v)[0]
        if norm == "linf":
            x = x + step * g.sign()
            x = torch.minimum(torch.maximum(x, x0 - eps), x0 + eps).clamp(0, 1)
        elif norm == "l2":
            x = x + step * g / rows(g.flatten(1).norm(dim=1))
            if box_first:
                x = x0 + torch.renorm(x.clamp(0, 1) - x0, p=2, dim=0, maxnorm=eps)
            else:
                x = (x0 + torch.renorm(x - x0, p=2, dim=0, maxnorm=eps)).clamp(0, 1)
        else:
            raise ValueError(norm)
    return x


def trades_loss(model, x, x_adv, y, beta):
    """CE(x, y) + β KL(p(x) ‖ p(x̂)), means over images, gradients through both branches.

    The KL's direction is that of TRADES' code, not of S000:100.
    """
    log_p, log_q = F.log_softmax(model(x), dim=1), F.log_softmax(model(x_adv), dim=1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(1)
    return F.nll_loss(log_p, y) + beta * divergence.mean()


def fast_search(model, x0, y, start, eps, alpha):
    """Wong et al. (2020), FGSM from the offset ``start`` ~ U(-ε, ε): clip(x0 + clip(δ + α sign ∇CE, ±ε), 0, 1).

    As in the public code, δ is cut to the box before the gradient is taken.  That code attacks in train mode.
    """
    delta = (x0 + start).clamp(0, 1) - x0
    v = (x0 + delta).requires_grad_(True)
    g = torch.autograd.grad(F.cross_entropy(model(v), y, reduction="sum"), v)[0]
    delta = (delta + alpha * g.sign()).clamp(-eps, eps)
    return (x0 + delta).clamp(0, 1)


def nfgsm_search(model, x0, y, noise, alpha):
    """de Jorge et al. (2022): the sign step from noise that is cut to the box only, as is its end."""
    v = (x0 + noise).clamp(0, 1).requires_grad_(True)
    g = torch.autograd.grad(F.cross_entropy(model(v), y, reduction="sum"), v)[0]
    return (v.detach() + alpha * g.sign()).clamp(0, 1)


def free_steps(model, optimizer, x, y, delta0, eps, step, m, box="loss"):
    """Shafahi et al. (2019): ``m`` replays of one batch; returns δ for the next batch and the losses.

    δ ascends with the gradient of the same backward pass as the weights descend with, that is at the weights before
    the step: so do both public codes.  They differ in the box.  ``"loss"``: the authors' code, the loss at
    clip(x + δ, 0, 1), whose clipped pixels give no gradient, and δ itself only in ±ε.  ``"delta"``: Wong et al.'s,
    the loss at x + δ, then δ clipped to ±ε and to the box of x (so the first replay of a batch can be outside).
    """
    delta, losses = delta0.clone(), []
    for _ in range(m):
        d = delta.clone().requires_grad_(True)
        x_hat = (x + d).clamp(0, 1) if box == "loss" else x + d
        loss = F.cross_entropy(model(x_hat), y)
        optimizer.zero_grad()
        loss.backward()
        delta = (delta + step * d.grad.sign()).clamp(-eps, eps)
        if box == "delta":
            delta = torch.minimum(torch.maximum(delta, -x), 1 - x)
        optimizer.step()
        losses.append(loss.item())
    return delta, losses


# Adversarial weight perturbation -------------------------------------------------------------------------------------


def awp_direction(model, loss, gamma, lr=0.01):
    """Wu et al. (2020): v = γ ‖w‖ d / ‖d‖ for each parameter, d what one SGD step on -loss changes in a copy.

    ``loss(model)`` closes over the batch.  Only tensors with "weight" in their name and more than one dimension move
    (no biases, no norms); one whose gradient is zero stays too.  ``lr`` (0.01 in the public code) cancels, up to the
    rounding of w + lr g - w.  The copy keeps the model's mode; the public code puts it in train mode.
    Returns {name: v}.
    """
    proxy = copy.deepcopy(model)
    optimizer = torch.optim.SGD(proxy.parameters(), lr=lr)
    optimizer.zero_grad()
    (-loss(proxy)).backward()
    optimizer.step()
    after, v = dict(proxy.named_parameters()), {}
    for name, w in model.named_parameters():
        if w.dim() > 1 and "weight" in name:
            d = after[name].detach() - w.detach()
            v[name] = gamma * w.detach().norm() * d / (d.norm() + 1e-20)
    return v


def awp_gradient(model, loss, v):
    """∇loss at w + v, the gradient with which w is then updated; ``model`` is left alone."""
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for name, w in moved.named_parameters():
            if name in v:
                w.add_(v[name])
    return parameter_gradient(moved, loss(moved))


def awp_step(model, optimizer, loss, v):
    """The public order: w + v, backward, optimizer step, minus v.

    The optimizer works at w + v, hence its weight decay pulls at w + v and not at w.
    """
    with torch.no_grad():
        for name, w in model.named_parameters():
            if name in v:
                w.add_(v[name])
    value = loss(model)
    optimizer.zero_grad()
    value.backward()
    optimizer.step()
    with torch.no_grad():
        for name, w in model.named_parameters():
            if name in v:
                w.sub_(v[name])
    return value.item()


def at_awp(model, x_adv, y, gamma):
    """The gradient of AT-AWP: direction and loss are CE(x̂, y)."""
    loss = lambda m: at_loss(m, x_adv, y)
    return awp_gradient(model, loss, awp_direction(model, loss, gamma))


def trades_awp(model, x, x_adv, y, beta, gamma):
    """The gradient of TRADES-AWP: direction and loss are the whole TRADES loss, x̂ found at w."""
    loss = lambda m: trades_loss(m, x, x_adv, y, beta)
    return awp_gradient(model, loss, awp_direction(model, loss, gamma))


def sam_gradient(model, loss, rho, adaptive):
    """Foret et al. eq. 2 and 3; adaptive: Kwon et al. eq. 10 with T = |w|, all parameters as one vector."""
    parameters = list(model.parameters())
    flat = lambda tensors: torch.cat([t.flatten() for t in tensors])
    w, g = flat(parameters).detach().clone(), flat(torch.autograd.grad(loss(model), parameters))
    scale = w.abs() if adaptive else torch.ones_like(w)
    torch.nn.utils.vector_to_parameters(w + rho * scale * scale * g / (scale * g).pow(2).sum().sqrt(), parameters)
    moved = torch.autograd.grad(loss(model), parameters)
    torch.nn.utils.vector_to_parameters(w, parameters)
    return list(moved)


# Sampling for training -----------------------------------------------------------------------------------------------


def sgld(energy, x0, noises, gain, std, box=False):
    """x ← x - gain ∇E(x) + std · noise, a step for each of ``noises``; ``box`` clips to [0, 1] after each step."""
    x = x0.clone()
    for noise in noises:
        v = x.clone().requires_grad_(True)
        x = x - gain * torch.autograd.grad(energy(v).sum(), v)[0] + std * noise
        if box:
            x = x.clamp(0, 1)
    return x


def jeat_sgld(energy, x0, noises, alpha, box=False):
    """JEAT eq. 9 and Algorithm 1 (S002:264): x ← x - α/2 ∇E(x) + √α N(0, I), no clipping written.

    CEM's Langevin step of size α (S000:76: gain α, std √2α) is this one with 2 α.
    """
    return sgld(energy, x0, noises, alpha / 2, alpha**0.5, box)


def jem_sgld(energy, x0, noises, step=1.0, std=0.01, box=False):
    """JEM's public code: x ← x + step ∇LSE f(x) + std N(0, I), unclipped, ``energy`` being -LSE f.

    There x is in [-1, 1].  The same chain in [0, 1], for the same function of the image, has step / 4 and std / 2.
    """
    return sgld(energy, x0, noises, step, std, box)


def replay_start(buffer, indices, fresh, uniform):
    """The chains' starts: ``uniform[i]`` where ``fresh[i]``, else ``buffer[indices[i]]``."""
    return torch.stack([uniform[i] if fresh[i] else buffer[indices[i]] for i in range(len(indices))])


def replay_store(buffer, indices, samples):
    """JEM's code: each sample, begun afresh or not, overwrites the entry drawn for it, the last one winning.

    JEAT only says "add to B" (S002:268).
    """
    buffer = buffer.clone()
    for i, sample in zip(indices.tolist(), samples, strict=True):
        buffer[i] = sample
    return buffer


# Likelihood ----------------------------------------------------------------------------------------------------------


def mle_loss(model, x_pos, x_neg):
    """Mean E(x⁺) - mean E(x⁻), whose gradient is JEAT eq. 6; E is the marginal energy."""
    return marginal_energy(model, x_pos).mean() - marginal_energy(model, x_neg).mean()


def jem_loss(model, x_pos, x_neg, x_lab, y):
    """Grathwohl et al. (2020), public code: -(mean LSE f(x⁺) - mean LSE f(x⁻)) + CE(x_lab, y), weights 1 and 1."""
    positive, negative = torch.logsumexp(model(x_pos), 1).mean(), torch.logsumexp(model(x_neg), 1).mean()
    return -(positive - negative) + F.cross_entropy(model(x_lab), y)


def prejeat_search(model, x0, y, start, eps, box, at="start"):
    """JEAT Algorithms 1 and 2 (S002:250-256, 522-528): δ ← clip(``start`` + ε sign ∇E(x, y), ±ε), x̂ = x0 + δ.

    The step is ε, not FAST's 1.25 ε.  The algorithm writes ∇_x E(x, y): ``at`` "start" takes it at x0 + start, as
    FAST does, "clean" at x0, to the letter.  It writes no clipping to [0, 1]: ``box`` adds it, to the start and to the
    end as FAST does.
    """
    delta = start
    if box:
        delta = (x0 + delta).clamp(0, 1) - x0
    v = (x0 + delta if at == "start" else x0.clone()).requires_grad_(True)
    g = torch.autograd.grad(joint_energy(model, v, y).sum(), v)[0]
    delta = (delta + eps * g.sign()).clamp(-eps, eps)
    return (x0 + delta).clamp(0, 1) if box else x0 + delta


def jeat_loss(model, x_adv, y, x_neg):
    """JEAT Algorithm 1 as written (S002:272-276): [E(x̂, y) - E(x̂)] + [E(x̂) - E(x̃)], batch means."""
    joint, marginal = joint_energy(model, x_adv, y).mean(), marginal_energy(model, x_adv).mean()
    return (joint - marginal) + (marginal - marginal_energy(model, x_neg).mean())


def jeat_loss_cancelled(model, x_adv, y, x_neg):
    """What is left of it: E(x̂, y) - E(x̃), batch means.

    So JEAT is the maximum likelihood of p(x, y) with x̂ for data: eq. 20 with the right sign, + E_p[∇E].
    """
    return joint_energy(model, x_adv, y).mean() - marginal_energy(model, x_neg).mean()


def jeat_eq15(model_before, model_after, x, x_adv, y):
    """JEAT eq. 15, per image: Δ_x E(x, y), Δ_x E(x), Δ_θ E(x, y), Δ_θ E(x).

    Δ_x: from x to x̂ before the update.  Δ_θ: at the x̂ found before the update, from before to after it.
    """
    with torch.no_grad():
        moved = [joint_energy(model_before, x_adv, y), marginal_energy(model_before, x_adv)]
        clean = [joint_energy(model_before, x, y), marginal_energy(model_before, x)]
        after = [joint_energy(model_after, x_adv, y), marginal_energy(model_after, x_adv)]
    return moved[0] - clean[0], moved[1] - clean[1], after[0] - moved[0], after[1] - moved[1]


# Weighted and pseudo-labelled training -------------------------------------------------------------------------------


def weat_weights(logits):
    """Mirza et al. (2024), public code: 1 / log(1 + exp |E(x)|), E = -LSE, detached; in (0, 1 / log 2]."""
    energy = -torch.logsumexp(logits.detach(), dim=1)
    return 1 / torch.log(1 + torch.exp(energy.abs()))


def weat_loss(model, x, x_adv, y, beta, ce="clean"):
    """(1/B) Σ w(x) CE + β (1/B) Σ w(x) KL(p(x) ‖ p(x̂)): weights of the clean images, not normalised to mean one.

    ``ce`` "clean" is WEAT_nat (β 6 by default there), "adversarial" WEAT_adv (β 7); x̂ as in TRADES, linf.  The public
    code takes log(p(x̂) + 1e-12) where this takes log p(x̂).
    """
    clean, adversarial = model(x), model(x_adv)
    w = weat_weights(clean)
    total = 0.0
    for i in range(len(y)):
        log_p, log_q = F.log_softmax(clean[i], dim=0), F.log_softmax(adversarial[i], dim=0)
        cross_entropy = -(log_p if ce == "clean" else log_q)[y[i]]
        total = total + w[i] * (cross_entropy + beta * (log_p.exp() * (log_p - log_q)).sum())
    return total / len(y)


def rst_loss(model, x_lab, y_lab, x_pseudo, y_pseudo, weight, normalise="batch"):
    """Cross-entropy on adversarial images with labels, and on others with pseudo-labels.

    ``"batch"``: (Σ_lab + w Σ_pseudo) / (n_lab + n_pseudo).  With w = 1 this is how Carmon et al.'s public code
    averages: one shuffled batch, half pseudo-labelled, one mean over it, no explicit weight.  ``"weights"``: divided
    by n_lab + w n_pseudo.  ``"separate"``: mean_lab + w mean_pseudo.  The objective of that code is TRADES on the
    joint batch (``rst_trades_loss``), not adversarial cross-entropy.  One forward pass over both.
    """
    losses = F.cross_entropy(model(torch.cat([x_lab, x_pseudo])), torch.cat([y_lab, y_pseudo]), reduction="none")
    labelled, pseudo = losses[: len(y_lab)].sum(), losses[len(y_lab) :].sum()
    if normalise == "separate":
        return labelled / len(y_lab) + weight * pseudo / len(y_pseudo)
    total = {"batch": len(y_lab) + len(y_pseudo), "weights": len(y_lab) + weight * len(y_pseudo)}[normalise]
    return (labelled + weight * pseudo) / total


def rst_trades_loss(model, x_lab, adv_lab, y_lab, x_pseudo, adv_pseudo, y_pseudo, beta):
    """Carmon et al. (2019), public code: the TRADES loss of the joint batch, pseudo-labels as labels."""
    x, x_adv = torch.cat([x_lab, x_pseudo]), torch.cat([adv_lab, adv_pseudo])
    return trades_loss(model, x, x_adv, torch.cat([y_lab, y_pseudo]), beta)


# Outside data --------------------------------------------------------------------------------------------------------


def uniform_cross_entropy(model, x):
    """Mean over images of -Σ_k (1/K) log p(k|x), the sum over classes written out."""
    p = F.softmax(model(x), dim=1)
    return sum(-torch.log(p[:, k]).mean() / p.shape[1] for k in range(p.shape[1]))


def oe_loss(model, x, y, x_out, weight=0.5):
    """Hendrycks et al. (2019), public code: CE + weight · -(mean_k f_k - LSE f), one forward pass of all images."""
    logits = model(torch.cat([x, x_out]))
    f_in, f_out = logits[: len(x)], logits[len(x) :]
    return F.cross_entropy(f_in, y) + weight * -(f_out.mean(1) - torch.logsumexp(f_out, dim=1)).mean()


def momentum_ascent(objective, x0, eps, step, steps, momentum):
    """l2 ascent on ``objective`` (B,) with v ← m v + g / ‖g‖ from v = 0, each step followed by ball, then box."""
    x, v = x0.clone(), torch.zeros_like(x0)
    for _ in range(steps):
        leaf = x.clone().requires_grad_(True)
        g = torch.autograd.grad(objective(leaf).sum(), leaf)[0]
        v = momentum * v + g / rows(g.flatten(1).norm(dim=1))
        offset = x + step * v - x0
        length = rows(offset.flatten(1).norm(dim=1))
        x = (x0 + torch.where(length > eps, offset * eps / length, offset)).clamp(0, 1)
    return x


def confidence(model, x):
    """max_k p(k|x)."""
    return F.softmax(model(x), dim=1).max(dim=1).values


def ratio_loss(model, x_adv, y, x_out_adv, lam):
    """Augustin et al. (2020), public code without its clean term: ½ (CE(x̂, y) + λ CE(uniform, p(·|x̂_out)))."""
    logits = model(torch.cat([x_adv, x_out_adv]))
    log_p = F.log_softmax(logits[len(x_adv) :], dim=1)
    return 0.5 * (F.cross_entropy(logits[: len(x_adv)], y) + lam * -log_p.mean())


def unit_ascent(objective, x0, step, steps):
    """x ← clip(x + step ∇ / ‖∇‖, 0, 1), ``steps`` times, in no ball: Binary AT eq. 8 with the code's clipping."""
    x = x0.clone()
    for _ in range(steps):
        leaf = x.clone().requires_grad_(True)
        g = torch.autograd.grad(objective(leaf).sum(), leaf)[0]
        x = (x + step * g / rows(g.flatten(1).norm(dim=1))).clamp(0, 1)
    return x


def dat_loss(model, x_adv, y, x, x_contrast):
    """DAT's public code: CE(x̂, y) + BCE-with-logits of LSE f, targets 1 at x and 0 at x', one mean over both."""
    s = torch.cat([torch.logsumexp(model(x), 1), torch.logsumexp(model(x_contrast), 1)])
    targets = torch.cat([torch.ones(len(x)), torch.zeros(len(x_contrast))]).to(s)
    return F.cross_entropy(model(x_adv), y) + F.binary_cross_entropy_with_logits(s, targets)


def self_annealed(model, x, x_contrast):
    """Binary AT eq. 14 for s = LSE f: the ASCENT direction mean (1 - σ(s(x))) ∇s(x) - mean σ(s(x')) ∇s(x')."""
    s = [torch.logsumexp(model(v), 1) for v in (x, x_contrast)]
    weights = (1 - torch.sigmoid(s[0])).detach() / len(x), torch.sigmoid(s[1]).detach() / len(x_contrast)
    return parameter_gradient(model, (weights[0] * s[0]).sum() - (weights[1] * s[1]).sum())


def r1(model, x):
    """½ mean ‖∇_x LSE f(x)‖², by one backward pass an image."""
    total = 0.0
    for image in x:
        leaf = image[None].clone().requires_grad_(True)
        g = torch.autograd.grad(torch.logsumexp(model(leaf), 1).sum(), leaf, create_graph=True)[0]
        total = total + 0.5 * (g**2).sum() / len(x)
    return total


def gat_loss(model, x, y, x_adv, target):
    """Yin et al. (2020), one detector at a time: mean BCE of σ(f_y) at x with 1 and of σ(f_t) at x̂ with 0."""
    terms = []
    for i in range(len(y)):
        terms.append(-torch.log(torch.sigmoid(model(x)[i, y[i]])))
        terms.append(-torch.log(1 - torch.sigmoid(model(x_adv)[i, target[i]])))
    return torch.stack(terms).mean()


# CEM: the likelihood gradient of p(x, y) ∝ exp f(x)[y], taken apart --------------------------------------------------
#
# All are ASCENT directions, lists of one tensor a parameter.  x̂ is a constant: the paper's identities hold for a fixed
# x̂, as AT's gradient does at the maximiser (Danskin), not through an unrolled attack.


def combine(terms):
    """Σ c_j g_j over pairs (c, list of tensors)."""
    total = [torch.zeros_like(t) for t in terms[0][1]]
    for c, gradient in terms:
        total = [a + c * b for a, b in zip(total, gradient, strict=True)]
    return total


def logit_gradient(model, x, k):
    """∇_θ f(x)[k] of one image."""
    return parameter_gradient(model, model(x[None])[0, k])


def expected_logit_gradient(model, x):
    """E_{p(k|x)} ∇_θ f(x)[k] of one image, the sum over classes written out; equal to ∇_θ LSE f(x) = -∇_θ E(x)."""
    p = F.softmax(model(x[None]).detach(), dim=1)[0]
    return combine([(p[k], logit_gradient(model, x, k)) for k in range(len(p))])


def cem_contrastive(model, x_adv, y):
    """Contrastive gradient, S000:96 second line and eq. 16: mean of ∇f(x̂)[y] - E_{p(k|x̂)} ∇f(x̂)[k].

    Claimed (S000:98, 326) and exact, for any x̂ fixed and any net: it is -∇_θ of ``at_loss(model, x̂, y)``.  Not
    covered: the paper draws x̂ ~ p_θ independently of (x, y); AT's x̂ depends on both, so the AT gradient is this
    formula on other pairs, not an estimate of the likelihood's term (hence "biased", S000:78).
    """
    return combine(
        [(1 / len(y), logit_gradient(model, x, k)) for x, k in zip(x_adv, y, strict=True)]
        + [(-1 / len(y), expected_logit_gradient(model, x)) for x in x_adv]
    )


def cem_contrastive_sampled(model, x_adv, y, y_hat):
    """Contrastive gradient, S000:96 first line: mean of ∇f(x̂)[y] - ∇f(x̂)[ŷ] for given ŷ.

    Equal to ``cem_contrastive`` only in expectation over ŷ ~ p(·|x̂), not with ŷ the arg max.
    """
    return combine(
        [(1 / len(y), logit_gradient(model, x, k)) for x, k in zip(x_adv, y, strict=True)]
        + [(-1 / len(y), logit_gradient(model, x, k)) for x, k in zip(x_adv, y_hat, strict=True)]
    )


def cem_consistency(model, x, x_adv, y):
    """Consistency gradient, S000:90 and 275, corrected: mean of ∇f(x)[y] - ∇f(x̂)[y].

    Printed is ∇f(x)[y] - ∇f(x̂)[ŷ], which with the contrastive term does not add up to the likelihood gradient.
    Claimed (S000:100): it vanishes where TRADES' KL does.  It need not: equal p leaves logits free by a constant,
    and equal values do not make equal gradients (f(x)[k] = w_k·x has mean(x - x̂) in row y, whatever the w).
    """
    return combine(
        [(1 / len(y), logit_gradient(model, a, k)) for a, k in zip(x, y, strict=True)]
        + [(-1 / len(y), logit_gradient(model, a, k)) for a, k in zip(x_adv, y, strict=True)]
    )


def cem_likelihood(model, x, y, x_neg):
    """The likelihood gradient, S000:82, with negatives for p_θ(x̂): mean ∇f(x)[y] - mean E_{p(k|x̂)} ∇f(x̂)[k].

    Exact, for as many negatives as images:
    (a) S000:90 corrected: ``cem_consistency(x, x̂, y)`` + ``cem_contrastive(x̂, y)``;
    (b) S000:108 and eq. 17 with x for x̂: -∇_θ CE(x, y), standard training; the paper's ≈ is only that replacement;
    and for any number of negatives: (c) -∇_θ [mean E(x, y) - mean E(x̂)], JEAT's cancelled loss with clean images.
    """
    return combine(
        [(1 / len(y), logit_gradient(model, a, k)) for a, k in zip(x, y, strict=True)]
        + [(-1 / len(x_neg), expected_logit_gradient(model, a)) for a in x_neg]
    )


def log_linear(w, x, x_adv, y):
    """Closed forms for f(x)[k] = w_k·x, no autograd: the contrastive, consistency and likelihood gradients in w (K, D).

    Contrastive: mean (e_y - p(x̂)) x̂ᵀ.  Consistency: mean e_y (x - x̂)ᵀ.  Likelihood: mean e_y xᵀ - p(x̂) x̂ᵀ.
    """
    x, x_adv = x.flatten(1), x_adv.flatten(1)
    contrastive, consistency, likelihood = torch.zeros_like(w), torch.zeros_like(w), torch.zeros_like(w)
    for i in range(len(y)):
        scores = torch.exp(x_adv[i] @ w.T)
        for k in range(len(w)):
            hit, p = float(k == y[i]), scores[k] / scores.sum()
            contrastive[k] += (hit - p) * x_adv[i] / len(y)
            consistency[k] += hit * (x[i] - x_adv[i]) / len(y)
            likelihood[k] += (hit * x[i] - p * x_adv[i]) / len(y)
    return contrastive, consistency, likelihood
