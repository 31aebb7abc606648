"""Encoders trained without labels: InfoNCE, adversarial InfoNCE, and adversarial contrastive learning (ACL).

CEM = Wang et al. (2021), whose NP-CEM is ``p(x, z) ∝ exp f(x, z)``, ``f = g(x)·z``, z = g of another augmentation of
the same image.  The gradient of its likelihood, with data as negatives, is that of InfoNCE (appendix C.4).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from advebm import energies
from advebm.attacks.projected import Attack
from advebm.core.config import check_choices
from advebm.core.errors import UserError
from advebm.descent import Energy
from advebm.energies import Logits
from advebm.models.modes import searching, using
from advebm.models.network import Head
from advebm.objectives.base import Batch, Context, Loss
from advebm.objectives.trades import divergence

Gather = Callable[[Tensor], Tensor]  # rows of this process -> rows of all processes, this one's first

MAX_VALIDATION_GROUP = 500  # largest number of images contrasted with one another in validation


class Views(NamedTuple):
    """Two augmentations of the same images, (B, C, H, W) each, clean or attacked."""

    x: Tensor
    view: Tensor


@dataclass(frozen=True)
class Negatives:
    """Negatives of an image: the other images of the same step, on all processes, and optionally a queue.

    Attributes:
        queue: number of encodings of second views of earlier steps that each stream keeps as negatives; 0: none.  They
            come from earlier weights of the same network, not from a moving average of it as in He et al. (2020).
        hardness: β of Robinson et al. (2021): negatives have weights proportional to ``exp(β f)``, as near ones are
            more informative.  This biases the estimate of NP-CEM's gradient (CEM appendix A.1); 0: equal weights.
    """

    queue: int = 0
    hardness: float = 0.0

    def __post_init__(self) -> None:
        if self.queue < 0 or not self.hardness >= 0:
            raise UserError(f"queue and hardness must be >= 0, got {self.queue} and {self.hardness}")


class Queue:
    """Ring buffer of a stream's newest encodings, (K, D); those in ``fresh`` join it after the optimiser's step."""

    def __init__(self, size: int, dimension: int) -> None:
        self.rows = torch.zeros(size, dimension)
        self.next = self.filled = 0
        self.fresh: Tensor | None = None

    def read(self, like: Tensor) -> Tensor:
        """Return the encodings stored so far, (at most K, D), with the device and dtype of ``like``."""
        return self.rows[: self.filled].to(like)

    def push(self) -> None:
        """Replace the oldest encodings by ``fresh``, if there are any, and clear ``fresh``."""
        if self.fresh is None:
            return
        size, count = len(self.rows), len(self.fresh)
        self.rows = self.rows.to(self.fresh.device)
        place = (self.next + torch.arange(count, device=self.fresh.device)) % size
        self.rows[place] = self.fresh.to(self.rows)
        self.next, self.filled, self.fresh = (self.next + count) % size, min(self.filled + count, size), None

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows.cpu(), "next": self.next, "filled": self.filled}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows, self.next, self.filled, self.fresh = state["rows"], state["next"], state["filled"], None


@dataclass(frozen=True)
class InfoNCE:
    """``-log exp f(x, z⁺) / Σ_k exp f(x, z_k)``, the positive among the z_k: CEM eq. 8; NT-Xent of Chen et al. (2020).

    The network is an encoder: a backbone and a projection head.  Labels are not used.

    Attributes:
        hidden, outputs: hidden width of the projection head, and dimension of g(x).
        head: the layers of the projection head: ``simclr``, two linear ones with a ReLU between, or ``acl``, three with
            batch norms, see :class:`advebm.models.network.Projection`.
        form: ``nt-xent``: both views are anchors, and all other views of the batch are negatives; ``infonce``: first
            views are anchors, second views their z_k, to which no gradient flows (CEM, footnote 1).
        temperature: τ in ``f = g(x)·z / τ``.
        cosine: whether f is the cosine similarity over τ, as in SimCLR, or the plain product over τ, as in CEM.
        negatives: negatives besides the other images of the step, and their weights.
    """

    hidden: int = 128
    outputs: int = 64
    head: Head = "simclr"
    form: Literal["nt-xent", "infonce"] = "nt-xent"
    temperature: float = 0.5
    cosine: bool = True
    negatives: Negatives = Negatives()

    needs: ClassVar[frozenset[str]] = frozenset({"view"})
    replays: ClassVar[int] = 1
    branch: ClassVar[str] = "clean"  # of dual batch norms: what attacked images use, and samplers unless told otherwise
    sources: ClassVar[tuple[str, ...]] = ("oord2018", "chen2020", "cem-workshop")

    def __post_init__(self) -> None:
        check_choices(self)
        if min(self.hidden, self.outputs) < 1:
            raise UserError(f"hidden and outputs must be at least 1, got {self.hidden} and {self.outputs}")
        if not 0 < self.temperature < math.inf:
            raise UserError(f"temperature must be > 0, got {self.temperature}; SimCLR and ACL have 0.5 on CIFAR-10")

    @property
    def cites(self) -> tuple[str, ...]:
        """Keys of ``citations.bib`` for the options in use."""
        return self.sources + ("robinson2021",) * (self.negatives.hardness > 0)

    def check(self, images: int, threat: Attack) -> None:
        """Raise UserError for a queue larger than the training split, or a threat with restarts."""
        if (size := self.negatives.queue) > images:
            raise UserError(f"negatives.queue is {size}, but there are {images} training images; lower it")
        if threat.restarts != 1:
            raise UserError(
                f"threat.restarts is 1 in the training of an encoder, got {threat.restarts}: the loss of an image "
                "depends on the others of its batch, whose restarts cannot be mixed"
            )

    def init(self, like: Tensor, generator: torch.Generator) -> Queue | None:
        """Return the stream's queue, or None without one.

        Raises:
            UserError: the stream has fewer than 2 images in a step, or more than the queue holds.
        """
        if (count := len(like)) < 2:
            raise UserError("an image is told apart from others of its stream, which has 1; raise train.batch")
        if not (size := self.negatives.queue):
            return None
        if size < count:
            raise UserError(f"a queue of {size} is smaller than the {count} images of a step; raise negatives.queue")
        return Queue(size, self.outputs)

    def search(self, model: nn.Module, batch: Batch, state: Queue | None, ctx: Context) -> Views:
        return views(batch)

    def loss(self, model: nn.Module, batch: Batch, found: Views, state: Queue | None, ctx: Context) -> Loss:
        anchors, references = self.encode(model, found, state)
        return self.contrast(anchors, references, state, ctx)

    def after(
        self, model: nn.Module, batch: Batch, found: Views, state: Queue | None, loss: Loss, ctx: Context
    ) -> None:
        if state is not None:
            state.push()

    def adversarial(self, batch: Batch, found: Views) -> Tensor | None:
        """Return None: the monitors of attacked images measure class energies, which an encoder does not have."""
        return None

    def encode(self, model: Logits, images: Views, state: Queue | None = None) -> tuple[Tensor, Tensor]:
        """Return encodings of anchors and of references, (N, D) each.

        ``infonce``: N = B, and reference i is the positive of anchor i.  ``nt-xent``: N = 2B, references are the
        anchors, and the positive of anchor i is the other view of its image.  A queue keeps the encodings of the
        second views in ``state.fresh``.
        """
        if self.form == "nt-xent":
            anchors = references = model(torch.cat(images))
        else:
            anchors = model(images.x)
            with torch.no_grad():
                references = model(images.view)
        if state is not None:
            state.fresh = references[-len(images.view) :].detach()
        return anchors, references

    def contrast(self, anchors: Tensor, references: Tensor, state: Queue | None, ctx: Context) -> Loss:
        """Return the mean loss of ``anchors``, contrasted with the references of all processes and the queue."""
        candidates = with_queue(ctx.gather(references), state)
        total = self.per_anchor_loss(anchors, candidates).mean()
        accuracy = self.positive_is_nearest(anchors.detach(), candidates.detach()).float().mean()
        return Loss(total, {"loss": total.detach(), "contrastive_accuracy": accuracy})

    def per_anchor_loss(self, anchors: Tensor, candidates: Tensor) -> Tensor:
        """Return the loss of each anchor, (N,), nats; the first candidates are this process's references."""
        loss = energies.nt_xent if self.form == "nt-xent" else energies.in_batch
        hardness = self.negatives.hardness
        return loss(anchors, candidates, hardness=hardness, temperature=self.temperature, cosine=self.cosine)

    def positive_is_nearest(self, anchors: Tensor, candidates: Tensor) -> Tensor:
        """Return whether each anchor's positive is the most similar of its candidates, bool (N,)."""
        scores, positive = self.similarities(anchors, candidates), torch.arange(len(anchors), device=anchors.device)
        if self.form == "nt-xent":
            scores.fill_diagonal_(-torch.inf)
            positive = positive.roll(len(positive) // 2)
        return scores.argmax(1) == positive

    def similarities(self, z: Tensor, references: Tensor) -> Tensor:
        """Return ``f(x_i, z_k)``, (N, M)."""
        return energies.similarities(z, references, temperature=self.temperature, cosine=self.cosine)

    def negative_loss(
        self, f: Logits, images: Views, state: Queue | None = None, gather: Gather = lambda rows: rows
    ) -> Energy:
        """Return the energy that an attack lowers: minus the loss of each anchor, CEM eq. 11.

        ``nt-xent``: a function of both views concatenated, (2B, C, H, W), which all move, so the loss of an image
        depends on the whole batch.  ``infonce``: a function of first views, (B, C, H, W); second views stay fixed.
        Negatives come from all processes that ``gather`` joins, and from the queue.
        """
        if self.form == "nt-xent":
            return lambda x: -self.per_anchor_loss(z := f(x), with_queue(gather(z), state))
        with torch.no_grad():
            candidates = with_queue(gather(f(images.view)), state)
        return lambda x: -self.per_anchor_loss(f(x), candidates)

    def moving(self, images: Views) -> Tensor:
        """Return the images to attack: both views, (2B, C, H, W), for ``nt-xent``; first views for ``infonce``."""
        return torch.cat(images) if self.form == "nt-xent" else images.x

    def moved(self, images: Views, found: Tensor) -> Views:
        """Return the views with the attacked images of :meth:`moving` put back in place."""
        return Views(*found.chunk(2)) if self.form == "nt-xent" else images._replace(x=found)

    def validate(self, model: nn.Module, batch: Batch, threat: Attack, generator: torch.Generator) -> dict[str, float]:
        """Return mean loss and share of anchors whose positive is nearest, for clean and attacked images.

        Images are contrasted within parts of at most 500, of about equal size.  Keys are ``val/loss`` and
        ``val/contrastive_accuracy``; under the threat ``val/robust_loss`` and ``val/robust_contrastive_accuracy``.
        """
        images, results = views(batch), dict[str, list[Tensor]]()
        parts = math.ceil(len(images.x) / MAX_VALIDATION_GROUP)
        for clean in map(Views, images.x.tensor_split(parts), images.view.tensor_split(parts)):
            with searching(model) as f:
                with using(model, self.branch):
                    x_adv = threat.minimize(self.negative_loss(f, clean), self.moving(clean), generator)
                attacked = self.moved(clean, x_adv)
                for name, pair, branch in (("", clean, "clean"), ("robust_", attacked, self.branch)):
                    with using(model, branch), torch.no_grad():
                        anchors, references = self.encode(f, pair)
                    correct = self.positive_is_nearest(anchors, references).cpu().double()
                    results.setdefault(f"val/{name}contrastive_accuracy", []).append(correct)
                    results.setdefault(f"val/{name}loss", []).append(self.per_anchor_loss(anchors, references))
        return {name: torch.cat(values).mean().item() for name, values in results.items()}


@dataclass(frozen=True)
class AdversarialInfoNCE(InfoNCE):
    """InfoNCE at images that an attack on it found (Kim et al., 2020): NP-CEM's contrastive gradient, CEM eq. 13.

    Attributes:
        hidden, outputs, head, temperature, cosine, negatives: see :class:`InfoNCE`.
        form: see :class:`InfoNCE`.  With ``infonce`` only the first views are attacked; with ``nt-xent`` both views are
            attacked together.
        attack: the inner maximisation, in eval mode, with CEM's settings (appendix B).  Its ``loss`` is not used.
        langevin: standard deviation of the noise of each step, in pixels of [0, 1], for Langevin dynamics (eq. 10)
            in place of the attack (eq. 11): images ascend ``log Σ_k exp f(x̂, z_k)`` over the encodings of the other
            views, without the term that pushes an image away from its own anchor z; steps, start and ball are the
            attack's.  None: run the attack.
        consistency: weight of ``KL(p(k|x) ‖ p(k|x̂))``, ``p(k|x) ∝ exp f(x, z_k)``, which vanishes where the
            consistency gradient of eq. 12 does.  It is the analogue of the KL term of TRADES, in the direction of
            the TRADES code; gradients flow through both sides.
    """

    attack: Attack = Attack(eps=0.5, norm="l2", steps=7, step_size=0.1)
    langevin: float | None = None
    consistency: float = 0.0

    halves: ClassVar[bool] = False  # whether the total is the mean of the losses at clean and attacked images
    sources: ClassVar[tuple[str, ...]] = ("kim2020", *InfoNCE.sources)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.consistency >= 0 or not (self.langevin is None or self.langevin >= 0):
            raise UserError(f"consistency and langevin must be >= 0, got {self.consistency} and {self.langevin}")
        if self.attack.restarts != 1:
            raise UserError("attack.restarts is 1 here, as the loss of an image depends on the others of its batch")

    def search(self, model: nn.Module, batch: Batch, state: Queue | None, ctx: Context) -> Views:
        images = views(batch)
        x = self.moving(images)
        with searching(model, view=ctx.view) as f, using(model, self.branch):
            if self.langevin is None:
                energy = self.negative_loss(f, images, state, ctx.gather)
                x_adv = self.attack.minimize(energy, x, ctx.generator)
            else:
                energy = self.langevin_energy(f, images, state, ctx.gather)
                descent = replace(self.attack.descent(), noise=self.langevin)
                start = self.attack.begin(x, ctx.generator)
                x_adv = descent(energy, start, origin=x, generator=ctx.generator)
        return self.moved(images, x_adv)

    def langevin_energy(
        self, f: Logits, images: Views, state: Queue | None = None, gather: Gather = lambda rows: rows
    ) -> Energy:
        """Return ``-log Σ_k exp f(x, z_k)``, which eq. 10 descends; z_k are fixed encodings of the other views."""
        with torch.no_grad():
            other_views = (images.view, images.x) if self.form == "nt-xent" else (images.view,)
            references = [with_queue(gather(f(view)), state) for view in other_views]

        def energy(x: Tensor) -> Tensor:
            pairs = zip(f(x).chunk(len(references)), references, strict=True)
            return torch.cat([energies.marginal(self.similarities(*pair)) for pair in pairs])

        return energy

    def loss(self, model: nn.Module, batch: Batch, found: Views, state: Queue | None, ctx: Context) -> Loss:
        """Return the loss at the attacked views (ACL: its mean with the loss at clean views), plus consistency."""
        with using(model, self.branch):
            attacked, references = self.encode(model, found, state)
        total, terms = self.contrast(attacked, references, state, ctx)
        if self.halves or self.consistency:
            with using(model, "clean"):
                clean, references = self.encode(model, views(batch))  # without ``state``: these do not join the queue
        if self.halves:
            clean_total, clean_terms = self.contrast(clean, references, state, ctx)
            terms = {"adversarial_loss": total.detach(), "clean_loss": clean_total.detach(), **terms}
            terms["clean_contrastive_accuracy"] = clean_terms["contrastive_accuracy"]
            total = (total + clean_total) / 2
        if self.consistency:
            gap = self.gap(clean, attacked, references, ctx.gather)
            total, terms = total + self.consistency * gap, {**terms, "consistency": gap.detach()}
        return Loss(total, {**terms, "loss": total.detach()})

    def gap(self, clean: Tensor, moved: Tensor, references: Tensor, gather: Gather = lambda rows: rows) -> Tensor:
        """Return mean ``KL(p(k|x) ‖ p(k|x̂))``; z_k are clean encodings of the other views, without gradient."""
        count = 2 if self.form == "nt-xent" else 1
        candidates = [gather(part) for part in reversed(references.detach().chunk(count))]
        sides = zip(clean.chunk(count), moved.chunk(count), candidates, strict=True)
        log_p = [[log_softmax(self.similarities(z, z_k), 1) for z in (a, b)] for a, b, z_k in sides]
        return torch.cat([divergence(*pair) for pair in log_p]).mean()


@dataclass(frozen=True)
class ACL(AdversarialInfoNCE):
    """Half the loss at clean views, half at attacked ones: adversarial contrastive learning, Jiang et al. (2020).

    This is their "dual stream", as in their code: a backbone with ``norm: dual`` has separate batch norms for clean
    and attacked images, and the attack uses those for attacked ones.  Their projection head is ``head: acl``, as wide
    as the features.

    Attributes:
        hidden, outputs, head, temperature, cosine: see :class:`InfoNCE`.
        negatives: see :class:`InfoNCE`.  A queue is refused: encodings of one branch are not valid negatives for those
            of the other.
        attack: the inner maximisation, with the authors' settings.
        form, langevin, consistency: see :class:`AdversarialInfoNCE`.
    """

    attack: Attack = Attack(eps=8 / 255, steps=5, step_size=2 / 255)

    branch: ClassVar[str] = "adversarial"
    halves: ClassVar[bool] = True
    sources: ClassVar[tuple[str, ...]] = ("jiang2020", *InfoNCE.sources)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.negatives.queue:
            raise UserError(
                f"negatives.queue is 0 for acl, got {self.negatives.queue}: encodings of both branches would mix; "
                "set it to 0, or take adversarial-infonce"
            )


def views(batch: Batch) -> Views:
    assert batch.view is not None
    return Views(batch.x, batch.view)


def with_queue(references: Tensor, state: Queue | None) -> Tensor:
    """Return the references (N, D) followed by the encodings in the queue, if there is one."""
    return references if state is None else torch.cat([references, state.read(references)])
