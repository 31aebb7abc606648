"""Binary adversarial training of critics, which tell data from other images that are moved to look like data.

Binary-AT = Yin et al. (2022), "Learning Energy-Based Models with Adversarial Training".
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from advebm import energies
from advebm.core.config import check_choices
from advebm.core.errors import UserError
from advebm.core.floats import widen
from advebm.descent import Constraint, Descent, Energy, both, box, l2_ball, unit
from advebm.models.modes import freeze_batch_norms, searching
from advebm.objectives.base import Batch, Context, Loss, Stateless, r1
from advebm.objectives.curriculum import Curriculum, CurriculumState, auroc

WON, STUCK = 0.99, 0.2  # the critic has won: accuracy > WON, negatives moved < STUCK * λK


class BinaryResult(NamedTuple):
    """Data and negatives, (B, C, H, W) each; l2 distance moved by the negatives (B,), and number of steps."""

    inside: Tensor
    outside: Tensor
    move: Tensor
    steps: int


class BinaryState(CurriculumState):
    """State of a stream, which refuses checkpoints from before the loss was halved: they would go on with another."""

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "loss": "mean"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state.get("loss") != "mean":
            raise UserError(
                "this run began when the loss of binary-at and binary-mle was twice what it is now, so it cannot go "
                "on; train again with half of its objective.r1 (with SGD also twice its optimizer.lr)"
            )
        super().load_state_dict(state)


@dataclass(frozen=True)
class BinaryAT(Stateless):
    """``½ [-log D(x) - log(1 - D(x'))]`` with ``D = σ(f)``, Binary-AT eq. 4 and 11; a critic with ``E(x) = -f(x)``.

    With R1 the loss is ``½ [mean -log D(x) + mean -log(1 - D(x'))] + r1 · ½ mean ‖∇f(x)‖²``: one mean over data and
    negatives together, as in the authors' code, so R1's weights and SGD's rates are on the scale of theirs.  The paper
    writes the sum of the two means, which is twice that.  ``dat`` and ``gat`` take the same mean.

    Negatives x' are ``outside`` images (p0) after K steps ``x ← x + λ ∇f / ‖∇f‖``, eq. 8, within [0, 1].  With K fixed
    this is algorithm 1, with K growing algorithm 2.  f learns the support of the data, not its density
    (proposition 1), so only the order of its values has a meaning.

    Batch norm uses its running statistics throughout and never updates them, as in the authors' code: in training from
    scratch it is an affine layer.

    Attributes:
        curriculum: how K grows.  The authors' code has a gate of 0.8 (its released models were trained with 0.9 and
            0.99) and a window of 100 steps of 32 images.
        step_size: λ, in pixels of [0, 1].
        radius: radius of an l2 ball around each outside image, as in eq. 6; None: no ball.
        inside_steps: number of steps of descent on f that perturb the data, as in the authors' code (5 on CIFAR-10);
            the paper has none.
        inside_radius: radius of an l2 ball around the data; None: no ball.
        r1: weight of ``½ E‖∇f‖²`` (Mescheder et al., 2018) at the data.  The authors have 0.01 on CIFAR-10, and 30 or
            100 at 256 pixels.
        r1_at: where R1 is taken if the data is perturbed: at the ``perturbed`` data, as in the code, or at the
            original ``data``.
    """

    curriculum: Curriculum = Curriculum(steps=25, window=3_200, images_per_step=250_000)
    step_size: float = 0.1
    radius: float | None = None
    inside_steps: int = 0
    inside_radius: float | None = None
    r1: float = 0.01
    r1_at: Literal["perturbed", "data"] = "perturbed"

    needs: ClassVar[frozenset[str]] = frozenset({"outside"})
    outputs: ClassVar[int | None] = 1
    cites: ClassVar[tuple[str, ...]] = ("binary-at", "mescheder2018")

    def __post_init__(self) -> None:
        check_choices(self)
        if not self.step_size > 0 or not self.r1 >= 0 or self.inside_steps < 0:
            got = f"{self.step_size}, {self.r1} and {self.inside_steps}"
            raise UserError(f"step_size must be > 0, r1 and inside_steps must be >= 0, got {got}")
        for name in ("radius", "inside_radius"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise UserError(f"{name} must be > 0 or none, got {value}")

    def init(self, like: Tensor, generator: torch.Generator) -> "BinaryState":
        return BinaryState(self.curriculum.start, self.curriculum.steps)

    def search(self, model: nn.Module, batch: Batch, state: CurriculumState, ctx: Context) -> BinaryResult:
        """Advance K, then move outside images to lower energy and, if ``inside_steps`` > 0, data to higher energy."""
        assert batch.outside is not None
        self.curriculum.advance(state, ctx.images)
        with searching(model, view=ctx.view) as f:
            critic: Energy = lambda x: energies.binary(f(x))
            outside = self._descend(state.steps, self.radius, critic, batch.outside)
            inside = self._descend(self.inside_steps, self.inside_radius, lambda x: -critic(x), batch.x)
        return BinaryResult(inside, outside, (outside - batch.outside).flatten(1).norm(dim=1), state.steps)

    def _descend(self, steps: int, radius: float | None, energy: Energy, x: Tensor) -> Tensor:
        constraint: Constraint = box() if radius is None else both(l2_ball(radius), box())
        return Descent(steps, self.step_size, unit, constraint)(energy, x)

    def loss(self, model: nn.Module, batch: Batch, found: BinaryResult, state: CurriculumState, ctx: Context) -> Loss:
        """Return half of :meth:`contrast` plus the weighted R1 penalty, which takes a double backward pass."""
        with freeze_batch_norms(model):
            both_sets = energies.binary(model(torch.cat([found.inside, found.outside])))
            data, negatives = both_sets.split([len(found.inside), len(found.outside)])
            total = self.contrast(data, negatives) / 2
            terms = {"loss": total.detach()}
            if self.r1:
                x = found.inside if self.r1_at == "perturbed" else batch.x
                penalty = r1(lambda z: energies.binary(model(z)), x)
                total = total + self.r1 * penalty
                terms = {"loss": total.detach(), "r1": penalty.detach()}
        steps = found.move.new_full((), found.steps)
        with torch.no_grad():
            terms |= {
                "energy_data": data.mean(),
                "energy_negative": negatives.mean(),
                "accuracy": (widen(data < 0).mean() + widen(negatives > 0).mean()) / 2,
                "auroc": auroc(data, negatives),
                "move": found.move.mean(),
                "steps": steps,
                "reach": self.step_size * steps,
            }
        return Loss(total, terms)

    def contrast(self, data: Tensor, negatives: Tensor) -> Tensor:
        """Return mean ``-log D(x)`` + mean ``-log(1 - D(x'))``, nats, from energies of data (B,) and negatives (M,)."""
        return energies.logistic(data, negatives)

    def after(
        self, model: nn.Module, batch: Batch, found: BinaryResult, state: CurriculumState, loss: Loss, ctx: Context
    ) -> None:
        """Record the step's readings; warn, once per stream, if the critic wins and negatives are stuck (figure 2)."""
        state.note(torch.stack([loss.terms[name] for name in ("auroc", "accuracy", "move")]), ctx.images)
        if state.warned or ctx.images - state.since < self.curriculum.window:
            return
        reach, (_, accuracy, move) = self.step_size * found.steps, state.mean()
        if accuracy > WON and move < STUCK * reach:
            state.warned = True
            ctx.note(
                f"the critic wins: it is right on {accuracy:.1%}, and negatives move by {move:.2g} of {reach:.2g} in "
                f"{found.steps} steps; a larger --objective.r1 gives them a gradient to follow"
            )


@dataclass(frozen=True)
class BinaryMLE(BinaryAT):
    """``½ [E(x) - E(x')]`` on the negatives of ``binary-at``, Binary-AT section 5.3: it is unbounded, and it diverges.

    Its gradient is that of ``binary-at`` (half of eq. 14) without the factors ``1 - D(x)`` and ``D(x')``.

    Attributes:
        curriculum, step_size, radius, inside_steps, inside_radius: see :class:`BinaryAT`.
        r1, r1_at: see :class:`BinaryAT`; the paper has no R1 here.
    """

    r1: float = 0.0

    def contrast(self, data: Tensor, negatives: Tensor) -> Tensor:
        return data.mean() - negatives.mean()
