import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from advebm.attacks.projected import Attack
from advebm.core import config, rng
from advebm.core.errors import UserError
from advebm.objectives.at import AT, PreJEAT
from advebm.objectives.awp import AWP
from advebm.objectives.base import Batch, Context
from advebm.objectives.contrastive import ACL, AdversarialInfoNCE, InfoNCE, Negatives
from advebm.objectives.cutmix import CutMix
from advebm.objectives.dat import DAT
from advebm.objectives.fast import FAST, NFGSM
from advebm.objectives.free import FREE
from advebm.objectives.gat import GAT
from advebm.objectives.langevin import JEAT, JEM, MLE, SGLD
from advebm.objectives.outlier import OE, RATIO
from advebm.objectives.standard import NoiseInjection, Standard
from advebm.objectives.trades import TRADES, WEAT
from tests.references import attacks as reference

SHORT = SGLD(steps=2, buffer=8)
OBJECTIVES = [
    Standard(),
    NoiseInjection(),
    AT(),
    AT(Attack(norm="l2", eps=0.5, steps=3), search_mode="train"),
    PreJEAT(),
    FAST(),
    NFGSM(),
    CutMix(),
    CutMix(FAST(watch_every=1)),
    CutMix(TRADES()),
    FREE(),
    TRADES(),
    WEAT(),
    WEAT(on="adversarial"),
    AWP(),
    AWP(TRADES()),
    MLE(SHORT),
    JEM(SHORT),
    JEAT(SHORT),
    OE(),
    RATIO(),
    DAT(),
    DAT(r1=0.1),
    AWP(DAT(Attack(steps=2))),
    GAT(),
    InfoNCE(),
    InfoNCE(outputs=5, form="infonce", negatives=Negatives(queue=8, hardness=0.5)),
    AdversarialInfoNCE(attack=Attack(steps=2), consistency=1.0),
    AdversarialInfoNCE(attack=Attack(steps=2), form="infonce", langevin=0.01),
    ACL(attack=Attack(steps=2)),
]


def name(objective):
    return config.describe(objective)["kind"]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=name)
def test_contract(objective, net, batch, generator):
    state, ctx = objective.init(batch.x, generator), Context(generator)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    found = objective.search(net, batch, state, ctx)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()), "a search left a trace"
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert net.training
    loss = objective.loss(net, batch, found, state, ctx)
    assert loss.total.ndim == 0
    assert loss.total.isfinite()
    assert all(not t.requires_grad and t.ndim == 0 for t in loss.terms.values())
    loss.total.backward()
    assert all(p.grad is not None for p in net.parameters())
    objective.after(net, batch, found, state, loss, ctx)
    moved = objective.adversarial(batch, found)
    assert moved is None or moved.shape == batch.x.shape
    assert config.build(config.describe(objective), "objective") == objective


@pytest.mark.parametrize("objective", OBJECTIVES, ids=name)
def test_one_generator_gives_one_result(objective, net, batch):
    net.eval()
    state = objective.init(batch.x, rng.generator(0))
    ctx = lambda seed: Context(rng.generator(seed))
    one, two, other = (tensors(objective.search(net, batch, state, ctx(seed))) for seed in (1, 1, 2))
    assert all(map(torch.equal, one, two))
    quiet = isinstance(objective, Standard | FREE | OE | RATIO | DAT) or type(objective) is InfoNCE
    assert all(map(torch.equal, one, other)) == quiet


def tensors(found):
    """The tensors in what a search returned."""
    if isinstance(found, torch.Tensor):
        return [found]
    items = found.values() if isinstance(found, dict) else found if isinstance(found, tuple) else ()
    return [tensor for item in items for tensor in tensors(item)]


def test_standard_loss_is_the_cross_entropy_of_the_images(net, batch, generator):
    loss = Standard().loss(
        net, batch, Standard().search(net, batch, None, Context(generator)), None, Context(generator)
    )
    torch.testing.assert_close(loss.total, F.cross_entropy(net(batch.x), batch.y))


def test_logged_terms_are_the_means_they_say(net, batch, generator):
    terms = Standard().loss(net, batch, batch.x, None, Context(generator)).terms
    logits = net(batch.x)
    torch.testing.assert_close(terms["energy_marginal"], -torch.log(torch.exp(logits).sum(1)).mean().detach())
    torch.testing.assert_close(terms["energy_joint"], -logits[range(6), batch.y].mean().detach())
    assert terms["accuracy"].item() == pytest.approx((logits.argmax(1) == batch.y).double().mean().item())
    torch.testing.assert_close(terms["loss"], terms["energy_joint"] - terms["energy_marginal"])


def test_standard_training_is_p_cem_with_data_as_negatives(net, batch):
    """CEM section 3.1: ∇ E_{p(k|x)}[f_k(x)] for the negative phase gives the gradient of cross-entropy."""
    net.eval()
    logits = net(batch.x)
    positive = logits[range(6), batch.y]
    negative = (logits.softmax(1).detach() * logits).sum(1)
    loss = Standard().loss(net, batch, batch.x, None, Context(torch.Generator())).total
    ours = torch.autograd.grad(loss, list(net.parameters()))
    theirs = torch.autograd.grad((negative - positive).mean(), list(net.parameters()))
    torch.testing.assert_close(ours, theirs)


def test_noise_injection_adds_white_noise_of_the_given_deviation(net, generator):
    batch = Batch(torch.full((50, 3, 8, 8), 0.5, dtype=torch.float64), torch.zeros(50, dtype=torch.long))
    noise = NoiseInjection(0.2).search(net, batch, None, Context(generator)) - batch.x
    assert abs(noise.std().item() - 0.2) < 4 * 0.2 / math.sqrt(2 * noise.numel())
    assert abs(noise.mean().item()) < 4 * 0.2 / math.sqrt(noise.numel())
    assert noise.max() > 0.5  # not clamped
    with pytest.raises(UserError):
        NoiseInjection(-1)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_at_step_agrees_with_a_reference(net, batch, generator, norm):
    """Search in eval mode, loss in train mode: the parameters' gradients agree."""
    eps, step = (0.05, 0.02) if norm == "linf" else (0.6, 0.25)
    objective = AT(Attack(eps=eps, norm=norm, steps=4, step_size=step, start="clean"))
    net.eval()
    adversarial = getattr(reference, f"pgd_{norm}")(net, batch.x, batch.y, eps, step, 4)
    net.zero_grad()
    net.train()
    parameters = list(net.parameters())
    found = objective.search(net, batch, None, Context(generator))
    ours = torch.autograd.grad(objective.loss(net, batch, found, None, Context(generator)).total, parameters)
    theirs = torch.autograd.grad(F.cross_entropy(net(adversarial), batch.y), parameters)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)  # renorm adds 1e-7 to a norm


def test_search_mode_decides_which_statistics_the_attack_sees(net, batch):
    for p in net[1].parameters():
        nn.init.constant_(p, 0.5)
    net[1].running_mean.fill_(0.7)
    attack = Attack(eps=0.1, steps=3, start="clean")
    ctx = Context(torch.Generator())
    by_running, by_batch = (AT(attack, mode).search(net, batch, None, ctx) for mode in ("eval", "train"))
    assert torch.equal(by_running, reference.pgd_linf(net.eval(), batch.x, batch.y, 0.1, 0.25 / 3, 3))
    assert not torch.equal(by_running, by_batch)


def test_training_on_what_was_found_lowers_the_loss_there(net, batch, generator):
    objective, ctx = AT(Attack(eps=0.1, steps=3)), Context(generator)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    found = objective.search(net, batch, None, ctx)
    before = F.cross_entropy(net(found), batch.y).item()
    for _ in range(20):
        optimizer.zero_grad()
        objective.loss(net, batch, found, None, ctx).total.backward()
        optimizer.step()
    assert F.cross_entropy(net(found), batch.y).item() < before / 2
