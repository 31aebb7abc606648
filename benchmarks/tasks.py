"""What is measured: the networks, and every task as ours and as the peers do it.

A task is a function of :class:`Setting` that prepares everything and returns a :class:`Contest`.  Peers get the same
weights as an ordinary module in torch's default memory format, and run with their default settings.  Loops of research
code (JEM, AT-EBMs, TRADES, plain adversarial training) are written anew here from what papers and code do, in float32.
"""

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, kl_div, log_softmax
from torch.utils.flop_counter import FlopCounterMode

from advebm import energies
from advebm.attacks.autoattack import AutoAttack
from advebm.attacks.projected import Attack
from advebm.core import rng
from advebm.descent import Descent, free, raw
from advebm.metrics.distances import Moments, frechet_distance
from advebm.metrics.verdicts import find_verdicts
from advebm.models.inference import BACKENDS, BackendName, make_view
from advebm.models.modes import searching
from advebm.models.network import Architecture, Network
from advebm.models.resnet import ResNet
from advebm.models.small import SmallConv
from advebm.models.wide_resnet import WideResNet
from advebm.objectives.at import AT
from advebm.objectives.base import Batch, Context, Objective
from advebm.objectives.binary import BinaryAT
from advebm.objectives.curriculum import Curriculum
from advebm.objectives.langevin import JEM, SGLD
from advebm.objectives.trades import TRADES
from advebm.runs.run import Run
from advebm.samplers.classifier import TA
from advebm.sampling import generate

NETWORKS: dict[str, Callable[[int], Any]] = {
    "digits": lambda width: SmallConv(width or 24),
    "resnet-8": lambda width: ResNet(8, width or 16),
    "resnet-18": lambda width: ResNet(18, width or 64),
    "wide-resnet-28": lambda width: WideResNet(28, width or 10),
}


class Setting(NamedTuple):
    """Who does what, and how much of it."""

    task: str
    who: str  # a peer, or "advebm" and a way: "advebm bf16"
    net: str = "resnet-8"
    batch: int = 128
    steps: int = 20
    size: int = 32
    width: int = 0
    run: str = ""
    tuned: bool = False
    threads: int = 0
    device: str = "cpu"

    @property
    def way(self) -> str:
        """How ours computes the network; the empty string for peers."""
        return self.who.removeprefix("advebm ") if self.who.startswith("advebm ") else ""


class Contest(NamedTuple):
    """One turn, how many images times steps it moves, and what can be said of its last result."""

    turn: Callable[[], Any]
    work: int
    quality: Callable[[], dict[str, float]] = dict
    flops: float = 0.0  # of one image's forward pass and gradient


def network(s: Setting, outputs: int = 10) -> tuple[Network, Tensor, Tensor]:
    """The network in eval mode, images and labels: those of a run, or fresh weights and what they say of noise."""
    if s.run:
        run = Run.open(s.run)
        model, test = run.model()[0], run.recipe.data.load().test
        part = test.take(torch.arange(s.batch) % len(test))
        x, y = part.float(), part.y
    else:
        channels, size = (1, 8) if s.net == "digits" else (3, s.size)
        design = Architecture(NETWORKS[s.net](s.width), outputs, channels, size, (0.5,) * channels, (0.25,) * channels)
        model = design.build(0).train()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for _ in range(3):  # running statistics like a trained network's
                model(torch.rand(32, channels, size, size, generator=generator))
        x = torch.rand(s.batch, channels, size, size, generator=generator)
        with torch.no_grad():
            y = model.eval()(x).argmax(1)
    model = model.eval().to(s.device)
    if not s.way:
        model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return model, x.to(s.device), y.to(s.device)


def flops(model: nn.Module, x: Tensor) -> float:
    """Of one image's forward pass and gradient, by torch's own count."""
    leaf = x[:2].clone().requires_grad_()  # the counter's hooks take backward(), not autograd.grad
    with searching(model) as f, FlopCounterMode(display=False) as counter:
        f(leaf).sum().backward()
    return counter.get_total_flops() / 2


def searched(model: nn.Module, x: Tensor, s: Setting) -> Callable[[Callable[[Callable[[Tensor], Tensor]], Any]], Any]:
    """Carries a search out in our way: ``searched(model, x, s)(lambda f: ...)``."""
    made = make_view(model, x, BACKENDS[s.way], loud=True)

    def carry_out(search: Callable[[Callable[[Tensor], Tensor]], Any]) -> Any:
        with searching(model, view=made) as f:
            return search(f)

    return carry_out


# Attacks --------------------------------------------------------------------------------------------------------------

EPS, STEP = 8 / 255, 2 / 255


def pgd(s: Setting) -> Contest:
    """PGD, linf 8/255 in steps of 2/255 from a uniform start."""
    model, x, y = network(s)
    cost = flops(model, x)
    if s.way:
        attack, carry_out = Attack(EPS, steps=s.steps, step_size=STEP), searched(model, x, s)
        search = lambda: carry_out(
            lambda f: attack.minimize(attack.negative_loss(f, y), x, rng.generator(0, device=x.device))
        )
    elif s.who == "torchattacks":
        peer = importlib.import_module("torchattacks").PGD(model, eps=EPS, alpha=STEP, steps=s.steps)
        search = lambda: peer(x, y)
    elif s.who == "foolbox":
        theirs = importlib.import_module("foolbox")
        wrapped = theirs.PyTorchModel(model, bounds=(0, 1), device=s.device)
        peer = theirs.attacks.LinfPGD(abs_stepsize=STEP, steps=s.steps)
        search = lambda: peer(wrapped, x, y, epsilons=EPS)[1]
    elif s.who == "art":
        estimators = importlib.import_module("art.estimators.classification")
        shape, classes = tuple(x.shape[1:]), model(x[:1]).shape[1]
        options = {"input_shape": shape, "nb_classes": classes, "clip_values": (0.0, 1.0), "device_type": s.device}
        wrapped = estimators.PyTorchClassifier(model, loss=nn.CrossEntropyLoss(), **options)
        evasion = importlib.import_module("art.attacks.evasion")
        options = {"eps": EPS, "eps_step": STEP, "max_iter": s.steps, "batch_size": s.batch, "verbose": False}
        peer = evasion.ProjectedGradientDescent(wrapped, num_random_init=1, **options)
        images, labels = x.cpu().numpy(), np.eye(classes, dtype=np.float32)[y.cpu().numpy()]
        search = lambda: torch.from_numpy(peer.generate(images, labels)).to(x)
    else:
        search = lambda: _plain_pgd(model, x, y, s.steps)
    return judged(search, model, y, s.batch * s.steps, cost)


def judged(search: Callable[[], Tensor], model: nn.Module, y: Tensor, work: int, cost: float) -> Contest:
    """A contest whose last images the float32 network judges."""
    found: list[Tensor] = []

    def turn() -> None:
        found[:] = [search().detach()]

    def quality() -> dict[str, float]:
        with searching(model) as f, torch.no_grad():
            out = f(found[0])
        return {"accuracy": (out.argmax(1) == y).double().mean().item(), "loss": cross_entropy(out, y).item()}

    return Contest(turn, work, quality, cost)


def _plain_pgd(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> Tensor:
    """The loop of most research code."""
    moved = (x + torch.empty_like(x).uniform_(-EPS, EPS)).clamp(0, 1)
    for _ in range(steps):
        moved = moved.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(cross_entropy(model(moved), y), moved)
        moved = moved.detach() + STEP * gradient.sign()
        moved = torch.min(torch.max(moved, x - EPS), x + EPS).clamp(0, 1)
    return moved.detach()


def autoattack(s: Setting) -> Contest:
    """AutoAttack's APGD-CE and targeted APGD with ``steps`` 0, all of it with 1; on a trained network."""
    model, x, y = network(s)
    eps, norm = (EPS, "linf") if not s.run else (lambda t: (t.eps, t.norm))(Run.open(s.run).recipe.threat)
    stands: list[Tensor] = []
    if s.way:
        ours = AutoAttack(eps, norm, "standard" if s.steps else "quick")
        precision = BACKENDS[s.way].precision

        def turn() -> None:
            stands[:] = [find_verdicts(model, x, y, ours, batch=s.batch, precision=precision).standing()]
    else:
        theirs = importlib.import_module("pyautoattack")
        names = {} if s.steps else {"version": "custom", "attacks": ["apgd-ce", "apgd-t"]}
        norms = {"linf": "Linf", "l2": "L2"}
        peer = theirs.AutoAttack(model, eps=eps, norm=norms[norm], device=s.device, seed=0, **names)
        if not s.steps:
            peer.apgd.n_restarts, peer.apgd_targeted.n_target_classes, peer.apgd_targeted.n_restarts = 1, 9, 1

        def turn() -> None:
            moved = peer.run_standard_evaluation(x, y, batch_size=s.batch)[0]
            with torch.no_grad():
                stands[:] = [model(moved).argmax(1) == y]

    return Contest(turn, s.batch, lambda: {"accuracy": stands[0].double().mean().item()})


# Sampling -------------------------------------------------------------------------------------------------------------

LANGEVIN = {"size": 1.0, "noise": 0.01}  # JEM's


def sgld(s: Setting) -> Contest:
    """JEM's chains: a step of 1 on the marginal energy, noise of 0.01; no replay buffer."""
    model, x, _ = network(s)
    cost = flops(model, x)
    if s.way:
        carry_out, chain = searched(model, x, s), Descent(s.steps, LANGEVIN["size"], raw, free, LANGEVIN["noise"])
        energy = lambda f: lambda z: energies.marginal(f(z))
        search = lambda: carry_out(lambda f: chain(energy(f), x, generator=rng.generator(0, device=x.device)))
    elif s.who == "torchebm":
        core, samplers = importlib.import_module("torchebm.core"), importlib.import_module("torchebm.samplers")

        class Energy(core.BaseModel):  # type: ignore[misc,name-defined]
            def __init__(self) -> None:
                super().__init__()
                self.net = model

            def forward(self, z: Tensor) -> Tensor:
                return -self.net(z).logsumexp(1)

        # its step is h in x - h ∇E + sqrt(2 h) noise_scale ε
        scale = LANGEVIN["noise"] / (2 * LANGEVIN["size"]) ** 0.5
        peer = samplers.LangevinDynamics(Energy(), LANGEVIN["size"], scale, device=s.device)
        search = lambda: peer.sample(x, n_steps=s.steps)
    else:
        search = lambda: _jem_chain(model, x, s.steps)
    found: list[Tensor] = []

    def turn() -> None:
        found[:] = [search().detach()]

    def quality() -> dict[str, float]:
        with searching(model) as f, torch.no_grad():
            energy = energies.marginal(f(found[0]))
        return {"energy": energy.mean().item(), "deviation": energy.std().item()}

    return Contest(turn, s.batch * s.steps, quality, cost)


def _jem_chain(model: nn.Module, x: Tensor, steps: int) -> Tensor:
    """As in JEM's code: weights take gradients, and the graph is retained."""
    chain = x.clone().requires_grad_()
    for _ in range(steps):
        (gradient,) = torch.autograd.grad(model(chain).logsumexp(1).sum(), [chain], retain_graph=True)
        chain.data += LANGEVIN["size"] * gradient + LANGEVIN["noise"] * torch.randn_like(chain)
    return chain.detach()


def sampling(s: Setting) -> Contest:
    """``size`` images from class Gaussians by the targeted attack, ``steps`` unit steps, as bytes in memory.

    The plain loop is that of most research code: batches of ``batch`` images, the network as it is.
    """
    model = Run.open(s.run).model()[0].to(s.device)
    recipe = Run.open(s.run).recipe
    data = recipe.data.load()
    sampler = TA(steps=s.steps)
    y = torch.arange(s.size) % len(data.classes)
    if s.way:

        def turn() -> None:
            generate.to_bytes(generate.generate(model, sampler, data, y, backend=cast(BackendName, s.way)).x)
    else:
        model.eval().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        start, generator = sampler.prepare(data), rng.generator(0, device=s.device)

        def turn() -> None:
            for labels in y.split(s.batch):
                x = start(torch.empty(len(labels), *data.shape, device=s.device), labels.to(s.device), generator)
                for _ in range(s.steps):
                    x = x.detach().requires_grad_()
                    (gradient,) = torch.autograd.grad(cross_entropy(model(x), labels.to(s.device)), x)
                    length = gradient.flatten(1).norm(dim=1)[:, None, None, None] + 1e-10
                    x = (x.detach() - sampler.step_size * gradient / length).clamp(0, 1)
                generate.to_bytes(x)

    return Contest(turn, s.size * s.steps)


# Training steps -------------------------------------------------------------------------------------------------------


def ours_step(s: Setting, model: Network, batch: Batch, objective: Objective, optimizer: Any) -> Callable[[], None]:
    """A step of our training loop: search through the view, loss in the precision of the way, update."""
    model.train()
    state = objective.init(batch.x, rng.generator(0))
    made = make_view(model, batch.x, BACKENDS[s.way], loud=True)
    model.precision = getattr(torch, BACKENDS[s.way].precision)

    def step() -> None:
        ctx = Context(rng.generator(0, device=batch.x.device), view=made)
        optimizer.zero_grad(set_to_none=True)
        found = objective.search(model, batch, state, ctx)
        objective.loss(model, batch, found, state, ctx).total.backward()
        optimizer.step()

    return step


def at_step(s: Setting) -> Contest:
    """Adversarial training, PGD with ``steps``, SGD."""
    model, x, y = network(s)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    if s.way:
        return Contest(
            ours_step(s, model, Batch(x, y), AT(Attack(EPS, steps=s.steps, step_size=STEP)), optimizer), len(x)
        )

    def step() -> None:
        model.eval()
        moved = _plain_pgd(model, x, y, s.steps)
        model.train()
        optimizer.zero_grad()
        cross_entropy(model(moved), y).backward()
        optimizer.step()

    return Contest(step, len(x))


def trades_step(s: Setting) -> Contest:
    """TRADES; its code computes p(x) anew in every inner step, and accumulates no gradients of weights there."""
    model, x, y = network(s)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    if s.way:
        attack = Attack(EPS, steps=s.steps, step_size=STEP, start="gaussian")
        return Contest(ours_step(s, model, Batch(x, y), TRADES(attack), optimizer), len(x))

    def step() -> None:
        model.eval()
        moved = x + 0.001 * torch.randn_like(x)
        for _ in range(s.steps):
            moved = moved.detach().requires_grad_()
            gap = kl_div(log_softmax(model(moved), 1), model(x).softmax(1), reduction="sum")
            (gradient,) = torch.autograd.grad(gap, [moved])
            moved = moved.detach() + STEP * gradient.sign()
            moved = torch.min(torch.max(moved, x - EPS), x + EPS).clamp(0, 1)
        model.train()
        optimizer.zero_grad()
        clean = model(x)
        robust = kl_div(log_softmax(model(moved.detach()), 1), clean.softmax(1), reduction="batchmean")
        (cross_entropy(clean, y) + 6 * robust).backward()
        optimizer.step()

    return Contest(step, len(x))


def jem_step(s: Setting) -> Contest:
    """JEM's step without its replay buffer: chains, cross-entropy, the difference of energies, Adam."""
    model, x, y = network(s)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-6)
    if s.way:
        chains = SGLD(s.steps, LANGEVIN["size"], LANGEVIN["noise"], buffer=0)
        return Contest(ours_step(s, model, Batch(x, y), JEM(chains, data_noise=0.0), optimizer), len(x))

    def step() -> None:
        model.eval()
        samples = _jem_chain(model, torch.rand_like(x), s.steps)
        model.train()
        gap = model(samples).logsumexp(1).mean() - model(x).logsumexp(1).mean()
        loss = cross_entropy(model(x), y) + gap
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return Contest(step, len(x))


def binary_step(s: Setting) -> Contest:
    """Binary-AT with K = ``steps``, half of the batch data and half negatives; without R1 and without its metrics."""
    model, x, _ = network(s, outputs=1)
    inside, outside = x[: s.batch // 2], x[s.batch // 2 :]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-6)
    if s.way:
        objective = BinaryAT(Curriculum(steps=s.steps, start=s.steps), step_size=0.1, r1=0.0)
        return Contest(
            ours_step(s, model, Batch(inside, y=inside[:, 0, 0, 0].long(), outside=outside), objective, optimizer),
            len(x),
        )

    def ascend() -> Tensor:
        moved = outside.clone()
        for _ in range(s.steps):
            moved = moved.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(model(moved)[:, 0].sum(), [moved])
            length = gradient.flatten(1).norm(dim=1)[:, None, None, None] + 1e-10
            shift = moved.detach() + 0.1 * gradient / length - outside
            moved = (outside + shift.renorm(2, 0, torch.inf)).clamp(0, 1)  # its ball is of infinite radius
        return moved.detach()

    if s.who == "AT-EBMs":  # its own search; it normalises images itself
        sys.path.insert(0, os.environ["AT_EBMS_SRC"])
        perturb, bare = importlib.import_module("pgd_attack").perturb, nn.Sequential(model.backbone, model.head)
        ascend = lambda: perturb(bare.eval(), outside, "L2", float("inf"), 0.1, s.steps, "cifar10")

    def step() -> None:
        model.eval()  # and so it stays: that code keeps batch norms by their running statistics
        moved = ascend()
        logits = torch.cat([model(inside), model(moved)])[:, 0]
        labels = torch.cat([torch.ones(len(inside)), torch.zeros(len(moved))]).to(x)
        optimizer.zero_grad()
        binary_cross_entropy_with_logits(logits, labels).backward()
        optimizer.step()

    return Contest(step, len(x))


# Metrics --------------------------------------------------------------------------------------------------------------


def fid(s: Setting) -> Contest:
    """The Fréchet distance of two sets of moments of ``size`` dimensions, from ``batch`` features each."""
    g = torch.Generator().manual_seed(0)
    mix = torch.randn(s.size, s.size, generator=g) / s.size**0.5
    pair = [torch.randn(s.batch, s.size, generator=g).relu() @ mix * scale for scale in (1.0, 1.1)]
    found = [0.0]
    if s.way:
        moments = [Moments.of(features) for features in pair]

        def turn() -> None:
            found[0] = float(frechet_distance(*moments))
    else:
        linalg = importlib.import_module("scipy.linalg")
        gaussians = [(v.mean(0), np.cov(v, rowvar=False)) for v in (features.double().numpy() for features in pair)]
        (m1, c1), (m2, c2) = gaussians

        def turn() -> None:
            root = linalg.sqrtm(c1 @ c2)
            found[0] = float(((m1 - m2) ** 2).sum() + np.trace(c1) + np.trace(c2) - 2 * np.trace(root.real))

    return Contest(turn, 1, lambda: {"distance": found[0]})


TASKS: dict[str, Callable[[Setting], Contest]] = {
    "pgd": pgd,
    "autoattack": autoattack,
    "sgld": sgld,
    "sampling": sampling,
    "at": at_step,
    "trades": trades_step,
    "jem": jem_step,
    "binary-at": binary_step,
    "fid": fid,
}


LONG = ("autoattack", "sampling")  # their turns are so long that what comes first in them does not matter


def trained(name: str, settings: list[tuple[str, Any]]) -> str:
    """The folder of a small adversarially trained network, trained by a recipe where it is not there yet."""
    from advebm.recipes import find
    from advebm.runs.recipe import resolve
    from advebm.workflows.train import fit

    where = Path("runs/benchmarks") / name
    if not (where / "config.yaml").exists() or not Run.open(where).finished:
        recipe = resolve(find(name), [*settings, ("name", f"{name}-bench")])
        fit(recipe, where, resume=(where / "config.yaml").exists(), device="cpu")
    return str(where)
