"""Find faults that make a classifier's energies or robust accuracies wrong, by running it; each finding says a fix."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from advebm import energies
from advebm.attacks.apgd import APGD
from advebm.attacks.base import Adversary, is_correct
from advebm.attacks.projected import Attack, fgsm
from advebm.attacks.square import Square
from advebm.core import checks, notebook, rng
from advebm.core.errors import UserError
from advebm.core.floats import widen
from advebm.data.sources import Images
from advebm.descent import per_sample
from advebm.energies import Logits
from advebm.models.batching import device_of
from advebm.models.modes import searching

SIGMAS = 3.0  # a difference of two accuracies counts if it exceeds this many standard errors
FEWEST = 50  # minimum number of images; with fewer, hardly any difference is significant
PART = 100  # images in one forward pass, at most
DRAWS = 10  # random noises tried on each image; it counts as broken if any of them changes its class
LEAD = 10.0  # nats from the second to the largest logit; at this gap 1 - p = 5e-5 is still well within float32
# Limit for ModelUnderTest.misfit: trained networks have 1.0 to 1.2, on images of noise 1.6, untrained norms 2.7 to 9
MISFIT = 2.0
QUERIES = 300  # of the square attack: enough to beat an attack whose gradients are useless


@dataclass(frozen=True)
class Finding:
    """One problem found in a model, or a check that was skipped.

    Attributes:
        name: name of the problem, such as ``normalisation-missing``.
        severity: a ``fault`` makes energies or robust accuracies wrong, a ``warning`` may; a check is ``skipped`` if an
            earlier fault makes its result meaningless.
        what: what was found, with the numbers that were measured.
        fix: what to do.
    """

    name: str
    severity: Literal["fault", "warning", "skipped"]
    what: str
    fix: str

    def __repr__(self) -> str:
        return f"{self.severity} {self.name}: {self.what}; to do: {self.fix}"


class Findings(list[Finding]):
    """What a model is examined for and was found, shown as lines and in notebooks as a table; otherwise a list."""

    @property
    def faults(self) -> list[Finding]:
        """The findings that make energies or robust accuracies wrong."""
        return [finding for finding in self if finding.severity == "fault"]

    def __repr__(self) -> str:
        return "\n".join(map(repr, self)) or f"no faults found by {len(CHECKS)} checks"

    def _repr_html_(self) -> str:
        rows = [(f.severity, f.name, f.what, f.fix) for f in self]
        return notebook.table(("", "finding", "what was found", "to do"), rows) if rows else notebook.line(self)


@dataclass(frozen=True)
class ModelUnderTest:
    """A model and the images it is examined on; results that several checks need are computed once."""

    model: nn.Module
    f: Logits  # the model in eval mode with frozen parameters
    x: Tensor  # (N, C, H, W) in [0, 1]
    y: Tensor  # (N,)
    threat: Attack
    generator: torch.Generator
    state: dict[str, Tensor]  # parameters and buffers before the first image
    training: bool  # whether the model was passed in train mode

    def outputs(self, x: Tensor, f: Logits | None = None) -> Tensor:
        """Return logits (N, K) of ``f`` (None: the model in eval mode), at most 100 images in a forward pass."""
        with torch.no_grad():
            return torch.cat([(f or self.f)(part) for part in x.tensor_split(self.parts)])

    @property
    def parts(self) -> int:
        """Number of batches of nearly equal size: no batch is a single image, which some networks refuse."""
        return math.ceil(len(self.x) / PART)

    @cached_property
    def logits(self) -> Tensor:
        return self.outputs(self.x)

    @cached_property
    def right(self) -> Tensor:
        """Whether each clean image is classified correctly, bool (N,)."""
        return self.logits.argmax(1) == self.y

    @cached_property
    def accuracy(self) -> float:
        return share(self.right)

    @cached_property
    def train_mode_logits(self) -> Tensor:
        """Logits in train mode, with batch norm statistics of each batch; those of eval mode if train mode fails."""
        with searching(self.model, training=True) as f:
            try:
                return self.outputs(self.x, f)
            except Exception:  # the model may raise anything
                return self.logits

    @cached_property
    def misfit(self) -> float:
        """The factor by which stored batch norm variances differ from those of the images: 1 if they agree.

        For a layer: the root mean square of the log ratio over channels.  For the model: the median over layers, as a
        factor; 1 if it has no batch norm or fails in train mode.
        """
        variances: dict[Any, list[Tensor]] = {}

        def record(norm: Any, inputs: tuple[Tensor, ...]) -> None:
            x = widen(inputs[0])
            variances.setdefault(norm, []).append(x.var([d for d in range(x.ndim) if d != 1]))

        norms = [m for m in self.model.modules() if isinstance(m, _BatchNorm) and m.running_var is not None]
        handles = [norm.register_forward_pre_hook(record) for norm in norms]
        with searching(self.model, training=True) as f:
            try:
                self.outputs(self.x, f)
            except Exception:  # the model may raise anything
                return 1.0
            finally:
                for handle in handles:
                    handle.remove()
        ratios = [(torch.stack(v).mean(0) + m.eps) / (widen(m.running_var) + m.eps) for m, v in variances.items()]
        layers = [ratio.log().square().mean().sqrt() for ratio in ratios]
        return torch.stack(layers).quantile(0.5).exp().item() if layers else 1.0

    def accuracy_of(self, logits: Tensor) -> float:
        return share(logits.argmax(1) == self.y)

    @cached_property
    def chance(self) -> float:
        """The best accuracy of a constant prediction: the share of the most frequent label."""
        return self.y.bincount().max().item() / len(self.y)

    @cached_property
    def pgd(self) -> Attack:
        """PGD with the threat's radius, norm and steps (but at least 20); its other settings are not used."""
        return Attack(eps=self.threat.eps, norm=self.threat.norm, steps=max(self.threat.steps, 20))

    @cached_property
    def pgd_accuracy(self) -> float:
        """Accuracy under :attr:`pgd`."""
        return self.accuracy_under(self.pgd)

    def accuracy_under(self, attack: Adversary, f: Logits | None = None) -> float:
        """Return the model's accuracy under an attack that searches on ``f`` (None: on the model itself)."""
        standing = []
        for x, y in zip(self.x.tensor_split(self.parts), self.y.tensor_split(self.parts), strict=True):
            x_adv = attack.find(f or self.f, x, y, self.generator)  # misclassified images stay as they are
            standing.append(is_correct(self.f, x_adv, y))
        return share(torch.cat(standing))

    def is_above(self, a: float, b: float) -> bool:
        """Return whether share ``a`` of the images is significantly above share ``b``, see :func:`exceeds`."""
        return exceeds(a, b, len(self.x))


Check = Callable[[ModelUnderTest], Finding | None]


def examine(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    threat: Attack,
    generator: torch.Generator,
    progress: Callable[[str], None] = lambda name: None,
) -> Findings:
    """Run all checks on a classifier and return the problems found: an empty list if there are none.

    A check that an earlier fault makes meaningless is skipped, and listed as such: fix the fault and examine again.
    The model's parameters and buffers are restored afterwards, even if it changes them itself.

    Args:
        model: maps images (B, C, H, W) in [0, 1] to logits (B, K), on any device.
        x, y: at least 50 images in [0, 1] that were not used for training, and their labels, int64 (N,).
        threat: gives radius, norm and number of steps (at least 20 are used); its other settings are ignored, so that a
            weak attack does not make a model look robust.
        generator: source of all random numbers, on the model's device.
        progress: called with the name of each check.

    Raises:
        UserError: images outside [0, 1] or fewer than 50, labels that do not fit them, a radius of zero, an encoder.
    """
    x = checks.images(x)
    checks.no_encoder(model)
    y = checks.labels(y, len(x), torch.iinfo(torch.int32).max)
    if len(x) < FEWEST:
        raise UserError(f"a model is examined on at least {FEWEST} images, got {len(x)}")
    if not threat.eps > 0:
        raise UserError(f"a model is examined at a radius above 0, got eps {threat.eps}; give --threat.eps")
    device, training = device_of(model), model.training
    findings = Findings()
    faults: dict[Check, str] = {}
    with preserve_state(model, generator) as state, searching(model) as f:
        tested = ModelUnderTest(model, f, x.float().to(device), y.to(device), threat, generator, state, training)
        for check, needs in CHECKS.items():
            progress(title(check))
            if (first := next((faults[need] for need in needs if need in faults), None)) is not None:
                findings.append(Finding(title(check), "skipped", f"not checked: {first}", f"mend {first} first"))
                continue
            try:
                finding = check(tested)
            except Exception as error:  # the model may raise anything
                finding = fault(title(check), f"the model fails: {describe_error(error)}", "mend what the message says")
            if finding is not None:
                findings.append(finding)
                if finding.severity == "fault":
                    faults[check] = finding.name
    return findings


def examine_split(
    model: nn.Module,
    split: Images,
    *,
    threat: Attack,
    count: int = 300,
    seed: int = 0,
    progress: Callable[[str], None] = lambda name: None,
) -> Findings:
    """Call :func:`examine` on ``count`` images drawn from a split, or on all of them if there are fewer."""
    if not split.labelled:
        raise UserError("a model is examined on labelled images, these have none")
    rows = torch.randperm(len(split), generator=rng.generator(seed, "doctor", "images"))[: max(count, 0)]
    subset, generator = split.take(rows), rng.generator(seed, "doctor", device=device_of(model))
    return examine(model, subset.float(), subset.y, threat=threat, generator=generator, progress=progress)


@contextmanager
def preserve_state(model: nn.Module, generator: torch.Generator) -> Iterator[dict[str, Tensor]]:
    """Yield a copy of parameters and buffers and restore them; seed the global random state and restore it as well."""
    state = {name: v.detach().clone() for name, v in tensors(model)}
    devices = [generator.device] if generator.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator, device=generator.device)))
        try:
            yield state
        finally:
            with torch.no_grad():
                for name, v in tensors(model):
                    if name in state and v.shape == state[name].shape:
                        v.copy_(state[name])


def tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Return all named parameters and buffers, including buffers that are not saved."""
    return [*model.named_parameters(), *model.named_buffers()]


def exceeds(a: float, b: float, count: int) -> bool:
    """Return whether ``a`` is above ``b`` by more than 3 standard errors, as proportions of ``count`` images each.

    The error is √(2 p(1-p)/n), p the mean of both: that of independent samples.  Both are measured on the same images,
    so the true error is smaller; it is overestimated on purpose, since of two good attacks one always breaks a few
    images more.
    """
    pooled = (a + b) / 2
    return a - b > SIGMAS * math.sqrt(2 * pooled * (1 - pooled) / count)


def title(check: Check) -> str:
    """Return the displayed name of a check, such as ``flat-loss``."""
    return check.__name__.replace("_", "-")


def about(check: Check) -> str:
    """Return the first line of a check's docstring, without the full stop."""
    return (check.__doc__ or "").splitlines()[0].rstrip(".")


def fault(name: str, what: str, fix: str) -> Finding:
    return Finding(name, "fault", what, fix)


def describe_error(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def share(hits: Tensor) -> float:
    return hits.cpu().double().mean().item()


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


# What the model returns ----------------------------------------------------------------------------------------------


def outputs(p: ModelUnderTest) -> Finding | None:
    """It takes images in [0, 1] and returns finite logits (batch, classes), at least one for each label."""
    x, shape = p.x[:PART], " x ".join(map(str, p.x.shape[1:]))
    try:
        with torch.no_grad():
            out = p.f(x)
    except Exception as error:  # the model may raise anything
        fix = f"it has to take float32 images (batch, {', '.join(map(str, x.shape[1:]))}) on {x.device}"
        return fault("forward", f"the model fails on images of {shape}: {describe_error(error)}", fix)
    if not isinstance(out, Tensor) or out.ndim != 2 or len(out) != len(x) or not out.dtype.is_floating_point:
        got = f"{out.dtype} of shape {tuple(out.shape)}" if isinstance(out, Tensor) else f"a {type(out).__name__}"
        fix = "return the logits alone, a floating-point tensor of a row an image and a column a class"
        return fault("shape", f"the model returns {got} for {len(x)} images, not ({len(x)}, classes)", fix)
    if out.shape[1] == 1:
        what = "the model returns one output an image: a critic, which has an energy but no classes"
        return fault("shape", what, "examine a classifier; of a critic, look at its energies (metric energies)")
    if len(bad := (~p.logits.isfinite()).any(1).nonzero()):
        fix = "look for a division by zero, a logarithm or root of zero, an overflow, or weights that diverged"
        return fault("not-finite", f"NaN or infinite logits for {len(bad)} of {len(p.x)} images", fix)
    if (most := int(p.y.max())) >= out.shape[1]:
        fix = "take a head with an output for each class, or the images that it was trained on"
        return fault("classes", f"the model has {out.shape[1]} outputs, the labels go up to {most}", fix)
    return None


def state(p: ModelUnderTest) -> Finding | None:
    """Its parameters and buffers stay as they are in eval mode."""
    p.outputs(p.x)
    changed = [name for name, v in tensors(p.model) if name not in p.state or not torch.equal(v, p.state[name])]
    if not changed:
        return None
    what = f"classifying images in eval mode changes the model's own {', '.join(changed[:5])}"
    fix = "update it only if self.training: what the model says must not depend on what it was asked before"
    return fault("state", what, fix)


def randomness(p: ModelUnderTest) -> Finding | None:
    """It gives the same images the same logits twice."""
    again = p.outputs(p.x)
    gap = (again - p.logits).abs().max().item()
    if gap <= 1e-4 * p.logits.abs().max().item():  # another order of float32 sums: relative error 1e-6
        return None
    changed = percent(share(again.argmax(1) != p.logits.argmax(1)))
    what = f"two passes over the same images differ by up to {gap:.3g} in the logits, in the class for {changed}"
    fix = (
        "switch dropout and noise off in eval mode; where randomness is the defence, attack its expectation: average "
        "gradients over passes (APGD samples, AutoAttack version rand)"
    )
    return fault("randomness", what, fix)


def batch(p: ModelUnderTest) -> Finding | None:
    """It gives an image the same logits alone as among others."""
    fix = "batch norm by running statistics and no statistic over the batch in eval mode"
    try:
        with torch.no_grad():
            alone = torch.cat([p.f(x) for x in p.x[:8].split(1)])
    except Exception as error:  # the model may raise anything
        return fault("batch", f"the model fails on one image alone: {describe_error(error)}", fix)
    gap, spread = (alone - p.logits[:8]).abs().max().item(), p.logits.std(0).max().item()
    if gap <= 0.01 * spread:  # kernels chosen by batch size differ by less, in half precision too
        return None
    what = f"an image alone and in a batch of {len(p.x) // p.parts} differ by up to {gap:.3g} in the logits"
    return fault("batch", f"{what}, which have a deviation of {spread:.3g} over images", fix)


def modes(p: ModelUnderTest) -> Finding | None:
    """It is as good in eval mode, in which everything is measured, as in train mode, and its batch norms fit."""
    training = p.accuracy_of(p.train_mode_logits)
    accuracies = f"accuracy {percent(p.accuracy)} in eval mode, {percent(training)} in train mode"
    stale = p.misfit > MISFIT and training >= p.accuracy
    if stale or p.is_above(training, p.accuracy):
        misfit = f"; the variances that batch norms keep are off by a factor of {p.misfit:.3g}" if stale else ""
        fix = (
            "advebm measures in eval mode and puts the mode back: the batch norm's running statistics do not fit the "
            "images; load the buffers with the weights, pass training images through it in train mode, or prepare the "
            "images as in training"
        )
        return fault("modes", accuracies + misfit, fix)
    if p.training and (p.train_mode_logits - p.logits).abs().max() > 0.01 * p.logits.std(0).max():
        fix = "call model.eval() before measuring elsewhere; advebm does so by itself and puts the mode back"
        return Finding("train-mode", "warning", f"the model came in train mode; {accuracies}", fix)
    return None


def logits(p: ModelUnderTest) -> Finding | None:
    """Its outputs are logits, not probabilities or their logarithms."""
    sums, normalisers = p.logits.float().sum(1), p.logits.float().logsumexp(1)
    if p.logits.min() >= 0 and p.logits.max() <= 1:
        unit_sums = ", each row sums to 1" if (sums - 1).abs().max() < 1e-3 else ""
        what = f"all outputs lie in [0, 1]{unit_sums}: probabilities, whose E(x) = -logsumexp is next to constant"
        return fault("probabilities", what, "return logits: remove the softmax or sigmoid at the end")
    if normalisers.abs().max() < 1e-3:
        what = "logsumexp of the outputs is 0 for every image: log-probabilities, so that E(x) is the same everywhere"
        fix = "return logits: remove the log_softmax at the end; accuracies stay, E(x) and samples need them"
        return fault("log-probabilities", what, fix)
    return None


def precision(p: ModelUnderTest) -> Finding | None:
    """Its logits have at least float32's precision."""
    if p.logits.dtype in (torch.float32, torch.float64):
        return None
    step = p.logits.abs().max().item() * torch.finfo(p.logits.dtype).eps
    what = f"the logits are {p.logits.dtype}, in steps of up to {step:.2g}: energies and gradients are as coarse"
    return fault("precision", what, "compute the last layer in float32, or autocast around the network: out.float()")


# What it makes of the images -----------------------------------------------------------------------------------------


def inputs(p: ModelUnderTest) -> Finding | None:
    """It wants images in [0, 1], and normalises them once."""
    mean, std = (v[None, :, None, None] for v in (p.x.mean((0, 2, 3)), p.x.std((0, 2, 3)).clamp_min(1e-6)))
    numbers = " and ".join("(" + ", ".join(f"{k:.3g}" for k in v.flatten().tolist()) + ")" for v in (mean, std))
    first = "let the first layer normalise, by the constants of training: advebm.wrap(module, mean=..., std=...)"
    once = "normalise once: the model's first layer does it, so hand it images in [0, 1]; or take that layer out"
    rescaled = {
        "normalisation-missing": ((p.x - mean) / std, f"normalised by mean and deviation {numbers}", first),
        "normalisation-twice": (p.x * std + mean, f"scaled back by mean and deviation {numbers}", once),
        "range-255": (255 * p.x, "as 0 to 255", "multiply by 255 in the first layer (wrap: std=1/255)"),
        "range-symmetric": (2 * p.x - 1, "in [-1, 1]", "take 2 x - 1 in the first layer (wrap: mean=0.5, std=0.5)"),
    }
    least = min(0.5, 4 * p.chance)  # only trained networks reach more; untrained ones may reach twice chance by luck
    better: dict[str, tuple[float, float]] = {}
    for name, (x, _, _) in rescaled.items():
        try:
            out = p.outputs(x)
        except Exception:  # a model that rejects another input range does not want it
            continue
        accuracy = p.accuracy_of(out)
        if p.is_above(accuracy, p.accuracy) and accuracy > least:
            better[name] = (energies.conditional(out, p.y).mean().item(), accuracy)
    if not better:
        return None
    name = min(better, key=lambda name: better[name][0])
    if p.is_above(p.accuracy_of(p.train_mode_logits), better[name][1]):  # then the batch norm statistics are the cause
        return None
    _, how, fix = rescaled[name]
    what = f"accuracy {percent(p.accuracy)} on images in [0, 1], {percent(better[name][1])} on images {how}"
    return fault(name, what, fix)


def labels(p: ModelUnderTest) -> Finding | None:
    """It is better than chance, and its classes are in the order of the labels."""
    classes, predicted = p.logits.shape[1], p.logits.argmax(1)
    pairs = (p.y[0::2] * classes + predicted[0::2]).bincount(minlength=classes**2).view(classes, classes)
    new_class = (pairs + 0.5 * torch.eye(classes, device=p.x.device)).argmax(
        1
    )  # classes without images keep their name
    y, predicted = p.y[1::2], predicted[1::2]
    before, after = share(predicted == y), share(predicted == new_class[y])
    if exceeds(after, before, len(y)) and len(new_class.unique()) == classes:  # untrained heads merge classes
        renames = [f"{k} -> {new_class[k]}" for k in range(classes) if new_class[k] != k]
        shown = ", ".join(renames[:10]) + ", …" * (len(renames) > 10)
        what = f"accuracy {percent(before)}, {percent(after)} if classes are renamed ({shown}), on images held out"
        return fault("labels-permuted", what, "bring labels and outputs into one order: often folders sorted as text")
    if not p.is_above(p.accuracy, p.chance):
        what = f"accuracy {percent(p.accuracy)} on {len(p.x)} images, of the most frequent label {percent(p.chance)}"
        fix = "check weights, images and preprocessing: is it the model, and what it was trained on?"
        return fault("chance", what, fix)
    return None


# What gradients and attacks find -------------------------------------------------------------------------------------


def gradient(p: ModelUnderTest) -> Finding | None:
    """Its logits have a gradient in the images that is neither zero nor NaN."""
    gradients = []
    for part in p.x.tensor_split(p.parts):
        with torch.enable_grad():
            x = part.detach().requires_grad_()
            out = p.f(x)
            top = out.topk(2, 1).values
            lead = (top[:, 0] - top[:, 1]).sum()
            lead_gradient = torch.autograd.grad(lead, x, allow_unused=True)[0] if out.requires_grad else None
        if lead_gradient is None:
            fix = "remove torch.no_grad, .detach, .item and numpy between images and logits, or attack by Square alone"
            return fault("no-gradient", "the logits do not depend on the images as far as autograd knows", fix)
        gradients.append(lead_gradient)
    flat = torch.cat(gradients).flatten(1)
    nan, zero = share(~flat.isfinite().all(1)), share((flat == 0).all(1))
    if not p.is_above(nan + zero, 0.0):
        return None
    what = f"the gradient of the leading logit over the next is zero for {percent(zero)} of the images"
    fix = (
        "look for rounding, thresholds, clamps and .detach (zero), roots and norms at zero (NaN); or attack with Square"
    )
    return fault("zero-gradient", f"{what}, NaN or infinite for {percent(nan)}", fix)


def flat_loss(p: ModelUnderTest) -> Finding | None:
    """Attacks on its cross-entropy are as strong as on that of logits scaled down."""
    top = p.logits.float().topk(2, 1).values
    lead = (top[:, 0] - top[:, 1]).median().item()
    if lead <= LEAD:
        return None
    scaled_accuracy = p.accuracy_under(p.pgd, lambda x: p.f(x) * (LEAD / lead))
    if not p.is_above(p.pgd_accuracy, scaled_accuracy):
        return None
    zero = share(energies.conditional(p.logits, p.y) == 0)
    what = (
        f"accuracy {percent(p.pgd_accuracy)} under {p.pgd.name}, {percent(scaled_accuracy)} with logits divided by "
        f"{lead / LEAD:.3g}; the first logit leads by {lead:.3g} (median), the cross-entropy is exactly 0 for "
        f"{percent(zero)} of the images"
    )
    fix = (
        "scale the logits down, or judge by losses that no scale flattens: AutoAttack, APGD with dlr, PGD on the margin"
    )
    return fault("flat-loss", what, fix)


def one_step(p: ModelUnderTest) -> Finding | None:
    """An attack of many steps is at least as strong as one step."""
    once = fgsm(p.pgd.eps, p.pgd.norm)
    single = p.accuracy_under(once)
    if not p.is_above(p.pgd_accuracy, single):
        return None
    what = f"accuracy {percent(p.pgd_accuracy)} under {p.pgd.name}, {percent(single)} under {once.name}"
    fix = (
        "gradients off the images mislead (masking, or catastrophic overfitting of one-step training): judge by "
        "AutoAttack, and train with more steps or from random starts"
    )
    return fault("one-step", what, fix)


def noise(p: ModelUnderTest) -> Finding | None:
    """The gradient does more harm than random noise of the same radius."""
    standing = p.right.clone()
    for _ in range(DRAWS):
        delta = rng.randn(p.x, p.generator)
        if p.pgd.norm == "linf":
            delta = delta.sign()
        else:
            delta = delta / per_sample(delta.flatten(1).norm(dim=1), delta)
        standing &= p.outputs((p.x + p.pgd.eps * delta).clamp(0, 1)).argmax(1) == p.y
    if not p.is_above(p.pgd_accuracy, share(standing)):
        return None
    worst = f"{percent(share(standing))} under the worst of {DRAWS} draws of noise of that radius"
    return fault("weaker-than-noise", f"accuracy {percent(p.pgd_accuracy)} under {p.pgd.name}, {worst}", MASKED)


def square(p: ModelUnderTest) -> Finding | None:
    """The gradient does more harm than a search that sees outputs alone."""
    search = Square(p.pgd.eps, p.pgd.norm, QUERIES)
    searched = p.accuracy_under(search)
    if not p.is_above(p.pgd_accuracy, searched):
        return None
    what = f"accuracy {percent(p.pgd_accuracy)} under {p.pgd.name}, {percent(searched)} under {search.name}"
    return fault("weaker-than-square", f"{what}, which sees no gradient", MASKED)


def autoattack(p: ModelUnderTest) -> Finding | None:
    """AutoAttack's first attack is at least as strong as plain projected gradient descent."""
    first = APGD(p.pgd.eps, p.pgd.norm, p.pgd.steps)
    adaptive = p.accuracy_under(first)
    if not p.is_above(adaptive, p.pgd_accuracy):
        return None
    what = f"accuracy {percent(adaptive)} under {first.name}, {percent(p.pgd_accuracy)} under {p.pgd.name}"
    fix = "APGD sets its steps by the loss, which does not follow its gradient: report the worst case, look for masking"
    return fault("weaker-autoattack", what, fix)


def radius(p: ModelUnderTest) -> Finding | None:
    """Accuracy falls to chance where the ball holds every image."""
    attacks = [Attack(eps=eps, norm="linf", steps=p.pgd.steps) for eps in (0.5, 1.0)]
    accuracies = {attack.name: p.accuracy_under(attack) for attack in attacks}
    if not p.is_above(min(accuracies.values()), p.chance):
        return None
    measured = ", ".join(f"{percent(accuracy)} under {name}" for name, accuracy in accuracies.items())
    limit = f"where every ball holds the grey image: nobody can be right on more than {percent(p.chance)}"
    return fault("large-radius", f"accuracy {measured}, {limit}", MASKED)


MASKED = (
    "the gradient is masked, so that robust accuracy by PGD means nothing here: look for steps that are not "
    "differentiable or replaced in the backward pass, attack through them (BPDA, EOT) or without gradients, and report "
    "AutoAttack"
)

BASIS = (outputs, state, randomness, batch, logits, precision, inputs, modes, labels)
ATTACKS = (gradient, flat_loss, one_step, noise, square, autoattack, radius)

# Each check, with the checks it depends on: it is skipped if one of those finds a fault.
CHECKS: dict[Check, tuple[Check, ...]] = {
    outputs: (),
    state: (outputs,),
    randomness: (outputs, state),
    batch: (outputs, state, randomness),
    logits: (outputs,),
    precision: (outputs,),
    inputs: (outputs,),
    modes: (outputs, state, randomness, inputs),
    labels: (outputs, inputs, modes),
    **{check: (*BASIS, *ATTACKS[:i]) for i, check in enumerate(ATTACKS)},
}
