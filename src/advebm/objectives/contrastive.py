"""Encoders trained without labels: InfoNCE, the adversarial one, and adversarial contrastive learning (ACL).

CEM = Wang et al. (2021), whose NP-CEM is ``p(x, z) ∝ exp f(x, z)``, ``f = g(x)·z``, z = g of another augmentation of
the same image.  Its likelihood's gradient, with data for negatives, is InfoNCE's (appendix C.4).
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
from advebm.objectives.base import Batch, Context, Loss
from advebm.objectives.trades import divergence

Gather = Callable[[Tensor], Tensor]  # rows of all processes, one's own first

PART = 500  # images that are told apart from one another in validation


def without_gathering(rows: Tensor) -> Tensor:
    """The rows of the only process."""
    return rows


class Views(NamedTuple):
    """Two augmentations of the same images, (B, C, H, W) each, as they are or attacked."""

    x: Tensor
    view: Tensor


@dataclass(frozen=True)
class Negatives:
    """What an image is told apart from; always the others of its stream and those of other processes at that moment.

    Attributes:
        queue: encodings of the second views of earlier steps, the newest so many of each stream; 0 for none.  They are
            of earlier weights of the same network, not of a slow copy of it as in He et al. (2020).
        hardness: β of Robinson et al. (2021): negatives are weighted by ``exp(β f)``, as near ones teach more, which
            biases the estimate of NP-CEM's gradient (CEM appendix A.1); 0 weights them alike.
    """

    queue: int = 0
    hardness: float = 0.0

    def __post_init__(self) -> None:
        if self.queue < 0 or not self.hardness >= 0:
            raise UserError(f"queue and hardness are >= 0, got {self.queue} and {self.hardness}")


class Queue:
    """The newest encodings of a stream, (K, D) when full; what is ``fresh`` joins them after the optimiser's step."""

    def __init__(self, size: int, dimension: int) -> None:
        self.rows = torch.zeros(size, dimension)
        self.next = self.filled = 0
        self.fresh: Tensor | None = None

    def read(self, like: Tensor) -> Tensor:
        """What there is, (at most K, D), on the device of ``like``."""
        return self.rows[: self.filled].to(like)

    def push(self) -> None:
        """The fresh ones in the place of the oldest."""
        if self.fresh is None:
            return
        size, count = len(self.rows), len(self.fresh)
        self.rows = self.rows.to(self.fresh.device)
        place = (self.next + torch.arange(count, device=self.fresh.device)) % size
        self.rows[place] = self.fresh.to(self.rows)
        self.next, self.filled, self.fresh = (self.next + count) % size, min(self.filled + count, size), None

    def state_dict(self) -> dict[str, Any]:
        """Everything."""
        return {"rows": self.rows.cpu(), "next": self.next, "filled": self.filled}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what :meth:`state_dict` gave."""
        self.rows, self.next, self.filled, self.fresh = state["rows"], state["next"], state["filled"], None


@dataclass(frozen=True)
class InfoNCE:
    """``-log exp f(x, z⁺) / Σ_k exp f(x, z_k)``, the positive among the z_k: CEM eq. 8; NT-Xent of Chen et al. (2020).

    The network is an encoder: a backbone and a projection head, Linear-ReLU-Linear.  Labels are never seen.

    Attributes:
        hidden, outputs: width of the projection head and dimension of g(x).
        form: ``nt-xent``: both views are anchors, and all other views of the batch are negatives; ``infonce``: first
            views are anchors, second ones their z_k, to which no gradient flows (CEM, footnote 1).
        temperature: τ in ``f = g(x)·z / τ``.
        cosine: whether f compares directions, as SimCLR does; CEM writes the plain product.
        negatives: what an image is told apart from.
    """

    hidden: int = 128
    outputs: int = 64
    form: Literal["nt-xent", "infonce"] = "nt-xent"
    temperature: float = 0.5
    cosine: bool = True
    negatives: Negatives = Negatives()

    needs: ClassVar[frozenset[str]] = frozenset({"view"})
    replays: ClassVar[int] = 1
    branch: ClassVar[str] = "clean"  # of dual batch norms, for attacked images
    sources: ClassVar[tuple[str, ...]] = ("oord2018", "chen2020", "cem-workshop")

    def __post_init__(self) -> None:
        check_choices(self)
        if min(self.hidden, self.outputs) < 1:
            raise UserError(f"hidden and outputs are at least 1, got {self.hidden} and {self.outputs}")
        if not 0 < self.temperature < math.inf:
            raise UserError(f"temperature is > 0, got {self.temperature}; SimCLR and ACL have 0.5 on CIFAR-10")

    @property
    def cites(self) -> tuple[str, ...]:
        """Keys of ``citations.bib`` for what is switched on."""
        return self.sources + ("robinson2021",) * (self.negatives.hardness > 0)

    def check(self, images: int, threat: Attack) -> None:
        """A queue holds other images than those of the step; an image's loss depends on the others of its batch."""
        if self.negatives.queue > images:
            wanted = self.negatives.queue
            raise UserError(f"negatives.queue is {wanted}, but there are {images} training images; lower it")
        if threat.restarts != 1:
            raise UserError(
                f"threat.restarts is 1 in the training of an encoder, got {threat.restarts}: the loss of an image "
                "depends on the others of its batch, whose restarts cannot be mixed"
            )

    def init(self, like: Tensor, generator: torch.Generator) -> Queue | None:
        """The queue of a stream."""
        if len(like) < 2:
            raise UserError("an image is told apart from others of its stream, which has 1; raise train.batch")
        if not (size := self.negatives.queue):
            return None
        if size < len(like):
            raise UserError(
                f"a queue of {size} is smaller than the {len(like)} images of a step; raise negatives.queue"
            )
        return Queue(size, self.outputs)

    def search(self, model: nn.Module, batch: Batch, state: Queue | None, ctx: Context) -> Views:
        """Nothing to search for: both views."""
        return views(batch)

    def loss(self, model: nn.Module, batch: Batch, found: Views, state: Queue | None, ctx: Context) -> Loss:
        """The mean over anchors."""
        anchors, references = self.encode(model, found, state)
        return self.contrast(anchors, references, state, ctx)

    def after(
        self, model: nn.Module, batch: Batch, found: Views, state: Queue | None, loss: Loss, ctx: Context
    ) -> None:
        """The second views join the queue."""
        if state is not None:
            state.push()

    def adversarial(self, batch: Batch, found: Views) -> Tensor | None:
        """None: instruments look at classes."""
        return None

    def encode(self, model: Logits, images: Views, state: Queue | None = None) -> tuple[Tensor, Tensor]:
        """Anchors and references, of which row i or its other view is the positive of anchor i: (N, D) both.

        The second views are kept for the queue.
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
        """The loss of encodings, among those of all processes and of the queue."""
        candidates = with_queue(ctx.gather(references), state)
        total = self.per_anchor_loss(anchors, candidates).mean()
        right = self.positive_is_nearest(anchors.detach(), candidates.detach()).float().mean()
        return Loss(total, {"loss": total.detach(), "contrastive_accuracy": right})

    def per_anchor_loss(self, anchors: Tensor, candidates: Tensor) -> Tensor:
        """The loss of each anchor, (N,)."""
        form = energies.nt_xent if self.form == "nt-xent" else energies.in_batch
        hardness = self.negatives.hardness
        return form(anchors, candidates, hardness=hardness, temperature=self.temperature, cosine=self.cosine)

    def positive_is_nearest(self, anchors: Tensor, candidates: Tensor) -> Tensor:
        """Whether the positive is the nearest of an anchor's candidates, bool (N,)."""
        scores, own = self.similarities(anchors, candidates), torch.arange(len(anchors), device=anchors.device)
        if self.form == "nt-xent":
            scores[own, own] = -torch.inf
            own = own.roll(len(own) // 2)
        return scores.argmax(1) == own

    def similarities(self, z: Tensor, references: Tensor) -> Tensor:
        """``f(x_i, z_k)``, (N, M)."""
        return energies.similarities(z, references, temperature=self.temperature, cosine=self.cosine)

    def negative_loss(
        self, f: Logits, images: Views, state: Queue | None = None, gather: Gather = without_gathering
    ) -> Energy:
        """What an attack lowers: minus the loss, CEM eq. 11; that of all processes, where ``gather`` is of all.

        ``nt-xent``: of both views, one after the other (2B, C, H, W), with all of them moving: an image's loss depends
        on the whole batch.  ``infonce``: of first views (B, C, H, W), against the second ones as they are.
        """
        if self.form == "nt-xent":
            return lambda x: -self.per_anchor_loss(z := f(x), with_queue(gather(z), state))
        with torch.no_grad():
            candidates = with_queue(gather(f(images.view)), state)
        return lambda x: -self.per_anchor_loss(f(x), candidates)

    def moving(self, images: Views) -> Tensor:
        """The images that an attack moves."""
        return torch.cat(images) if self.form == "nt-xent" else images.x

    def moved(self, images: Views, found: Tensor) -> Views:
        """Both views, after it."""
        return Views(*found.chunk(2)) if self.form == "nt-xent" else images._replace(x=found)

    def validate(self, model: nn.Module, batch: Batch, threat: Attack, generator: torch.Generator) -> dict[str, float]:
        """Loss, and share of anchors whose positive is the nearest, as images are and under a threat.

        They are told apart in equal parts of at most 500.
        """
        images, found = views(batch), dict[str, list[Tensor]]()
        parts = math.ceil(len(images.x) / PART)
        for clean in map(Views, images.x.tensor_split(parts), images.view.tensor_split(parts)):
            with searching(model) as f:
                with using(model, self.branch):
                    attacked = self.moved(
                        clean, threat.minimize(self.negative_loss(f, clean), self.moving(clean), generator)
                    )
                for name, pair, branch in (("", clean, "clean"), ("robust_", attacked, self.branch)):
                    with using(model, branch), torch.no_grad():
                        anchors, references = self.encode(f, pair)
                    right = self.positive_is_nearest(anchors, references).double()
                    found.setdefault(f"val/{name}contrastive_accuracy", []).append(right)
                    found.setdefault(f"val/{name}loss", []).append(self.per_anchor_loss(anchors, references))
        return {name: torch.cat(values).mean().item() for name, values in found.items()}


@dataclass(frozen=True)
class AdversarialInfoNCE(InfoNCE):
    """InfoNCE at images that an attack on it found (Kim et al., 2020): NP-CEM's contrastive gradient, CEM eq. 13.

    Attributes:
        hidden, outputs, form, temperature, cosine, negatives: as for ``infonce``.  With ``form: infonce`` the first
            views are attacked, against second ones that stay; with ``nt-xent`` both are, together.
        attack: the inner maximisation, in eval mode; CEM's (appendix B).  Its ``loss`` is not used.
        langevin: deviation of the noise of each step, in pixels, for eq. 10 in place of eq. 11: images climb
            ``log Σ_k exp f(x̂, z_k)`` over the other views' encodings, with noise, and are not driven from their own
            anchor z; steps, start and ball are the attack's.  None attacks.
        consistency: weight of ``KL(p(k|x) ‖ p(k|x̂))``, ``p(k|x) ∝ exp f(x, z_k)``, which vanishes where eq. 12's
            consistency gradient does; it stands to this loss as the term of TRADES to adversarial training, in the
            direction of that code, and gradients flow through both sides.
    """

    attack: Attack = Attack(eps=0.5, norm="l2", steps=7, step_size=0.1)
    langevin: float | None = None
    consistency: float = 0.0

    halves: ClassVar[bool] = False  # whether the loss at clean images is the other half
    sources: ClassVar[tuple[str, ...]] = ("kim2020", *InfoNCE.sources)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.consistency >= 0 or not (self.langevin is None or self.langevin >= 0):
            raise UserError(f"consistency and langevin are >= 0, got {self.consistency} and {self.langevin}")
        if self.attack.restarts != 1:
            raise UserError("attack.restarts is 1 here, as the loss of an image depends on the others of its batch")

    def search(self, model: nn.Module, batch: Batch, state: Queue | None, ctx: Context) -> Views:
        """Attacked views, or where Langevin dynamics led them."""
        images = views(batch)
        with searching(model, view=ctx.view) as f, using(model, self.branch):
            if self.langevin is None:
                found = self.attack.minimize(
                    self.negative_loss(f, images, state, ctx.gather), self.moving(images), ctx.generator
                )
            else:
                drift = self.langevin_energy(f, images, state, ctx.gather)
                found = self._run_langevin(drift, self.moving(images), self.langevin, ctx.generator)
        return self.moved(images, found)

    def langevin_energy(
        self, f: Logits, images: Views, state: Queue | None = None, gather: Gather = without_gathering
    ) -> Energy:
        """``-log Σ_k exp f(x, z_k)``, z_k the encodings of the other views, which stay: what eq. 10 descends."""
        with torch.no_grad():
            others = (images.view, images.x) if self.form == "nt-xent" else (images.view,)
            references = [with_queue(gather(f(other)), state) for other in others]

        def energy(x: Tensor) -> Tensor:
            pairs = zip(f(x).chunk(len(references)), references, strict=True)
            return torch.cat([energies.marginal(self.similarities(*pair)) for pair in pairs])

        return energy

    def _run_langevin(self, energy: Energy, x: Tensor, noise: float, generator: torch.Generator) -> Tensor:
        descent = replace(self.attack.descent(), noise=noise)
        return descent(energy, self.attack.begin(x, generator), origin=x, generator=generator)

    def loss(self, model: nn.Module, batch: Batch, found: Views, state: Queue | None, ctx: Context) -> Loss:
        """The loss at what was found, or half of it and half of the one at clean images; and the consistency."""
        with using(model, self.branch):
            moved, references = self.encode(model, found, state)
        total, terms = self.contrast(moved, references, state, ctx)
        if self.halves or self.consistency:
            with using(model, "clean"):
                anchors, references = self.encode(model, views(batch))  # of these nothing joins the queue
        if self.halves:
            clean, seen = self.contrast(anchors, references, state, ctx)
            terms = {"adversarial_loss": total.detach(), "clean_loss": clean.detach(), **terms}
            terms["clean_contrastive_accuracy"] = seen["contrastive_accuracy"]
            total = (total + clean) / 2
        if self.consistency:
            gap = self.gap(anchors, moved, references, ctx.gather)
            total, terms = total + self.consistency * gap, {**terms, "consistency": gap.detach()}
        return Loss(total, {**terms, "loss": total.detach()})

    def gap(self, clean: Tensor, moved: Tensor, references: Tensor, gather: Gather = without_gathering) -> Tensor:
        """Mean ``KL(p(k|x) ‖ p(k|x̂))`` over the clean encodings of the other views, which get no gradient."""
        count = 2 if self.form == "nt-xent" else 1
        others = [gather(part) for part in reversed(references.detach().chunk(count))]
        sides = zip(clean.chunk(count), moved.chunk(count), others, strict=True)
        log_p = [[log_softmax(self.similarities(z, other), 1) for z in (a, b)] for a, b, other in sides]
        return torch.cat([divergence(*pair) for pair in log_p]).mean()


@dataclass(frozen=True)
class ACL(AdversarialInfoNCE):
    """Half the loss at clean views, half at attacked ones: adversarial contrastive learning, Jiang et al. (2020).

    Their "dual stream", as in their code: a backbone with ``norm: dual`` has batch norms for each half, and the attack
    sees those of its own.  Their projection head has three layers and batch norms, here it has two and none.

    Attributes:
        hidden, outputs, form, temperature, cosine, negatives: as for ``infonce``, without a queue: encodings of one
            branch are no negatives for those of the other.
        attack: their inner maximisation.
        langevin, consistency: as for ``adversarial-infonce``.
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
    """Both views of a batch."""
    assert batch.view is not None
    return Views(batch.x, batch.view)


def with_queue(references: Tensor, state: Queue | None) -> Tensor:
    """References, and what the queue holds."""
    return references if state is None else torch.cat([references, state.read(references)])
