"""The doctor finds each planted fault, by its name and nothing else, and is silent on healthy models."""

import copy
import json
import math
import re
import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

import advebm
from advebm import cli
from advebm.attacks.projected import Attack
from advebm.core.errors import UserError
from advebm.data.sources import Images
from advebm.diagnostics.doctor import (
    ATTACKS,
    CHECKS,
    ModelUnderTest,
    autoattack,
    examine,
    examine_split,
    exceeds,
    outputs,
    title,
)
from advebm.models.modes import searching
from advebm.models.network import Normalize

DATA = advebm.load_data("digits")
MEAN, STD = DATA.statistics()
X, Y = DATA.test.float()[:300], DATA.test.y[:300]
FAINT = 0.35 + 0.3 * X
THREAT = Attack(eps=0.9, norm="l2", steps=20)


def fit(model, *, eps=0.0, epochs=12):
    """Adam on the cross-entropy of digits, on images moved by an attack of three steps if ``eps`` is positive."""
    x, y = DATA.train.float(), DATA.train.y
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for epoch in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(64):
            moved = x[rows]
            if eps:
                with searching(model) as f:
                    attack = Attack(eps=eps * min(1, epoch / 5), norm="l2", steps=3)
                    moved = attack.minimize(attack.negative_loss(f, y[rows]), moved, generator) if epoch else moved
            loss = nn.functional.cross_entropy(model.train()(moved), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def network():
    """Convolutions with batch norm on normalised images."""
    layers = [nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
    layers += [nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(Normalize(MEAN, STD), *layers, nn.Linear(512, 10))


def seeded(build, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build()


@pytest.fixture(scope="session")
def standard():
    return seeded(lambda: fit(network()))


@pytest.fixture(scope="session")
def adversarial():
    return seeded(lambda: fit(network(), eps=0.9))


@pytest.fixture(scope="session")
def linear():
    return seeded(lambda: fit(nn.Sequential(nn.Flatten(), nn.Linear(64, 10))))


def look(model, x=X, y=Y, threat=THREAT, seed=0):
    return examine(model, x, y, threat=threat, generator=torch.Generator().manual_seed(seed))


class Around(nn.Module):
    """A network with something before and after it."""

    def __init__(self, net, before=lambda x: x, after=lambda out: out):
        super().__init__()
        self.net, self.before, self.after = net, before, after

    def forward(self, x):
        return self.after(self.net(self.before(x)))


class Backward(torch.autograd.Function):
    """The identity, whose gradient is another: ``of(gradient, x)``."""

    @staticmethod
    def forward(ctx, x, of):
        ctx.save_for_backward(x)
        ctx.of = of
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return ctx.of(gradient, *ctx.saved_tensors), None


def backward(net, of):
    return Around(net, before=lambda x: Backward.apply(x, of))


def untracked(net):
    """Batch norm whose running statistics were never updated, though the weights were trained."""
    net = copy.deepcopy(net)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
    return net


class Confused(Around):
    """Takes the first three classes for one another, in eval mode alone."""

    def forward(self, x):
        out = self.net(x)
        return out if self.training else out[:, [1, 2, 0, *range(3, 10)]]


class Counting(Around):
    """Moves a buffer of its own whenever it is asked."""

    def __init__(self, net):
        super().__init__(net)
        self.register_buffer("asked", torch.zeros(()))

    def forward(self, x):
        self.asked += len(x)
        return self.net(x)


class Adapting(Around):
    """Takes its batch norm's statistics from the batch, in whatever mode."""

    def forward(self, x):
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.training = True
        return self.net(x)


@torch.no_grad()
def without_gradient(out):
    return out.clone()


def on_the_grid(gradient, x):
    """The gradient at images of whole bytes, its opposite at all others."""
    whole = ((255 * x).round() / 255 - x).abs().flatten(1).amax(1) < 1e-6
    return torch.where(whole[:, None, None, None], gradient, -gradient)


def bright_is_nan(gradient, x):
    """NaN for about half of the images."""
    return torch.where(x.mean((1, 2, 3), keepdim=True) > 0.3, torch.nan, gradient)


def several(x):
    if len(x) == 1:
        raise ValueError("expected more than one image")
    return x


class Planted(NamedTuple):
    plant: Callable[[nn.Sequential], nn.Module]
    threat: Attack = THREAT
    x: torch.Tensor = X


def faint(net):
    """The network for images of which black and white are 0.35 and 0.65, normalised once, and then once again."""
    x = FAINT
    return Around(net, before=lambda v: ((v - x.mean()) / x.std() - 0.35) / 0.3)


LARGE, SMALL = Attack(eps=0.35), Attack(eps=1 / 255)
PLANTED = {
    "forward": Planted(lambda net: Around(net, before=lambda x: x[:, :, :4])),
    "shape": Planted(lambda net: Around(net, after=lambda out: (out, None))),
    "not-finite": Planted(lambda net: Around(net, after=lambda out: torch.where(out > 12, torch.nan, out))),
    "classes": Planted(lambda net: Around(net, after=lambda out: out[:, :9])),
    "state": Planted(Counting),
    "randomness": Planted(lambda net: Around(net, after=lambda out: out + 0.1 * torch.randn_like(out))),
    "batch": Planted(lambda net: Adapting(copy.deepcopy(net))),
    "modes": Planted(untracked),
    "probabilities": Planted(lambda net: Around(net, after=lambda out: out.softmax(1))),
    "log-probabilities": Planted(lambda net: Around(net, after=lambda out: out.log_softmax(1))),
    "precision": Planted(lambda net: Around(net, after=lambda out: out.half())),
    "normalisation-missing": Planted(lambda net: net[1:]),
    "normalisation-twice": Planted(faint, x=FAINT),
    "range-255": Planted(lambda net: Around(net, before=lambda x: x / 255)),
    "range-symmetric": Planted(lambda net: Around(net, before=lambda x: (x + 1) / 2)),
    "labels-permuted": Planted(lambda net: Around(net, after=lambda out: out[:, [1, 0, *range(2, 10)]])),
    "chance": Planted(lambda net: nn.Sequential(*net[:-1], seeded(lambda: nn.Linear(512, 10)))),
    "no-gradient": Planted(lambda net: Around(net, after=without_gradient)),
    "zero-gradient": Planted(lambda net: Around(net, before=lambda x: (8 * x).round() / 8)),
    "flat-loss": Planted(lambda net: Around(net, after=lambda out: 1e4 * out)),
    "one-step": Planted(lambda net: backward(net, on_the_grid)),
    "weaker-than-noise": Planted(lambda net: backward(net, lambda g, x: -g), LARGE),
    "weaker-than-square": Planted(lambda net: backward(net, lambda g, x: -g)),
    "large-radius": Planted(lambda net: backward(net, lambda g, x: -g), SMALL),
    "shape: a critic": Planted(lambda net: Around(net, after=lambda out: out[:, :1])),
    "shape: feature maps": Planted(lambda net: Around(net, after=lambda out: out[:, :, None])),
    "batch: refuses one": Planted(lambda net: Around(net, before=several)),
    "modes: no batch norm's doing": Planted(Confused),
    "modes: more contrast would help a little": Planted(lambda net: Around(untracked(net), before=lambda x: 0.3 * x)),
    "chance: contrast helps by luck": Planted(
        lambda net: nn.Sequential(*net[:-1], seeded(lambda: nn.Linear(512, 10), 3))
    ),
    "probabilities: sigmoid": Planted(lambda net: Around(net, after=torch.sigmoid)),
    "zero-gradient: some are NaN": Planted(lambda net: backward(net, bright_is_nan)),
    "no-gradient: other leaf": Planted(lambda net: Around(net, before=lambda x: x.detach().requires_grad_())),
}


def faults(findings):
    return [f.name for f in findings if f.severity == "fault"]


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_found_and_nothing_else(standard, name):
    plant, threat, x = PLANTED[name]
    findings = look(plant(standard).eval(), x, threat=threat)
    assert faults(findings) == [name.split(":")[0]], findings
    assert all(f.what and f.fix and f.severity in ("fault", "skipped") for f in findings)


HEALTHY = [(name, threat) for name in ("standard", "adversarial", "linear") for threat in (THREAT, LARGE)]


@pytest.mark.parametrize(("name", "threat"), [*HEALTHY, ("linear", SMALL)], ids=lambda v: getattr(v, "name", v))
def test_the_doctor_is_silent_on_healthy_models(request, name, threat):
    assert look(request.getfixturevalue(name), threat=threat) == []


def test_dropout_is_healthy_where_it_rests_in_eval_mode(standard):
    model = nn.Sequential(*standard[:-1], nn.Dropout(0.5), standard[-1], nn.Softmax(1))  # so that attacks are skipped
    assert faults(look(model.eval())) == ["probabilities"]
    always = Around(standard, after=lambda out: nn.functional.dropout(out, 0.5, training=True))
    assert faults(look(always.eval())) == ["randomness"]


def test_a_difference_counts_beyond_three_standard_errors():
    """Of two independent proportions, each p ± √(p(1-p)/n), around p = 0.5 and around p = 0.05."""
    error = math.sqrt(2 * 0.25 / 100)
    assert exceeds(0.5 + 1.51 * error, 0.5 - 1.51 * error, 100)
    assert not exceeds(0.5 + 1.49 * error, 0.5 - 1.49 * error, 100)
    assert not exceeds(0.4, 0.6, 100)
    assert not exceeds(0.0, 0.0, 100)
    assert exceeds(10 / 100, 0.0, 100) and not exceeds(8 / 100, 0.0, 100)  # noqa: PT018


def test_no_trace_is_left_even_by_a_model_that_changes_itself(standard):
    model = Counting(copy.deepcopy(standard))
    model.net[0].train()
    modes = [m.training for m in model.modules()]
    before = {name: v.clone() for name, v in model.state_dict().items()}
    random = torch.get_rng_state()
    look(model)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, before[name]) for name, v in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)


def test_the_same_generator_gives_the_same_findings(standard):
    noisy = PLANTED["randomness"].plant(standard).eval()
    assert look(noisy) == look(noisy)
    assert look(noisy) != look(noisy, seed=1)


def patient(model, x=X):
    with searching(model) as f:
        return ModelUnderTest(model, f, x, Y[: len(x)], THREAT, torch.Generator().manual_seed(0), {}, False)


def test_the_misfit_of_a_batch_norm_by_hand():
    norm = nn.BatchNorm2d(1, eps=1e-12)
    norm.running_var.copy_(4 * X.var())
    assert patient(nn.Sequential(norm), X[:100]).misfit == pytest.approx(4 * X.var().item() / X[:100].var().item())
    assert patient(nn.Sequential(nn.Flatten(), nn.Linear(64, 10))).misfit == 1


def test_batch_norms_fit_or_not_by_a_wide_margin(standard, adversarial):
    for model in (standard, adversarial):
        assert patient(model).misfit < 1.25 < 2.5 < patient(untracked(model)).misfit


def test_batch_norms_that_do_not_fit_are_found_on_images_too_few_to_show_it(standard):
    few, model = slice(60), untracked(standard).eval()
    assert not exceeds(1.0, patient(model, X[few]).accuracy, 60), "the accuracies alone do not say so"
    assert faults(look(model, X[few], Y[few])) == ["modes"]


def test_train_mode_is_a_warning(standard):
    """The numbers are right, since they are taken in eval mode; elsewhere they may not be."""
    model = nn.Sequential(*copy.deepcopy(standard), nn.Softmax(1)).train()
    warning, *skipped = look(model)[1:]
    assert (warning.name, warning.severity) == ("train-mode", "warning")
    assert "call model.eval()" in warning.fix
    assert [f.name for f in skipped] == [title(check) for check in ATTACKS]


def test_a_weak_attack_is_not_taken_for_a_strong_model(linear):
    """Of the threat, radius and norm count: no finding comes from its steps, its start or its loss."""
    weak = Attack(eps=0.9, norm="l2", steps=1, step_size=1e-4, start="clean", loss="energy")
    assert look(linear, threat=weak) == []
    patient = ModelUnderTest(linear, linear, X, Y, weak, torch.Generator(), {}, False)
    assert patient.pgd == THREAT


def test_chance_is_the_most_frequent_label(standard):
    """A model that always says 0 is right on three quarters of these images, and has learnt nothing."""
    rows = torch.cat([(Y == 0).nonzero()[:27], (Y > 0).nonzero()[:9]]).squeeze(1).repeat(3)
    finding, *_ = look(Around(standard, after=lambda out: 0 * out + 9 * torch.eye(10)[0]).eval(), X[rows], Y[rows])
    assert finding.name == "chance"
    assert "accuracy 75.0 % on 108 images, of the most frequent label 75.0 %" in finding.what


def test_images_are_drawn_from_all_of_a_split(standard):
    """Sorted by class, the first 200 hold none of the classes that this model exchanges."""
    rows = Y.argsort()
    split = Images((255 * X[rows]).byte(), Y[rows])
    model = Around(standard, after=lambda out: out[:, [*range(8), 9, 8]]).eval()
    assert faults(examine_split(model, split, threat=THREAT, count=200)) == ["labels-permuted"]
    with pytest.raises(UserError, match="on labelled images"):
        examine_split(model, Images(split.x, -torch.ones_like(split.y)), threat=THREAT)


def test_a_permutation_names_the_classes(standard):
    (finding, *_) = look(PLANTED["labels-permuted"].plant(standard).eval())
    assert "(0 -> 1, 1 -> 0)" in finding.what


def test_several_faults_are_found_at_once_and_what_they_hide_is_skipped(standard):
    findings = look(Around(standard[1:], after=lambda out: out.softmax(1)).eval())
    assert faults(findings) == ["probabilities", "normalisation-missing"]
    skipped = {f.name: f.what for f in findings if f.severity == "skipped"}
    assert set(skipped) == {"modes", "labels", *map(title, ATTACKS)}
    assert skipped["labels"] == "not checked: normalisation-missing"
    assert skipped["gradient"] == "not checked: probabilities"


def test_every_check_needs_only_what_comes_before_it():
    order = list(CHECKS)
    for check, needs in CHECKS.items():
        assert all(order.index(need) < order.index(check) for need in needs)
        assert check is outputs or outputs in needs


def test_models_that_fail_later_are_findings_too(standard, linear):
    """Here: in the backward pass, in other places than a check expects, in train mode, and outside [0, 1]."""

    def fails(gradient, x):
        raise RuntimeError("no backward pass here")

    (finding, *_) = look(backward(standard, fails).eval())
    assert (finding.name, finding.severity) == ("gradient", "fault")
    assert "no backward pass here" in finding.what

    class Strict(Around):
        def forward(self, x):
            if self.training or not 0 <= x.min() <= x.max() <= 1:
                raise ValueError("only in eval mode, only in [0, 1]")
            return self.net(x)

    assert look(Strict(linear).eval()) == []


def test_autoattack_has_to_be_as_strong_as_plain_descent(standard):
    """Told that plain descent breaks all images at a radius at which few can be broken, the doctor notices."""
    with searching(standard) as f:
        patient = ModelUnderTest(standard, f, X, Y, SMALL, torch.Generator().manual_seed(0), {}, False)
        assert autoattack(patient) is None
        patient.__dict__["pgd_accuracy"] = 0.0
        assert autoattack(patient).name == "weaker-autoattack"


@pytest.mark.parametrize(
    ("x", "y", "threat", "message"),
    [
        (255 * X, Y, THREAT, r"images must lie in \[0, 1\], got \[0, 255\]; divide by 255"),
        ((255 * X).byte(), Y, THREAT, "divide bytes by 255"),
        (2 * X - 1, Y, THREAT, "undo the normalisation"),
        (X[0], Y, THREAT, "images are a tensor"),
        (X, Y[:-1], THREAT, r"labels are a tensor \(300,\), one for each image"),
        (X, Y.float(), THREAT, "labels are int64"),
        (X, Y - 1, THREAT, "labels must lie in 0 to"),
        (X[:40], Y[:40], THREAT, "at least 50 images, got 40"),
        (X, Y, Attack(eps=0), "radius above 0"),
    ],
)
def test_bad_input_is_one_clear_error(linear, x, y, threat, message):
    with pytest.raises(UserError, match=message):
        look(linear, x, y, threat)


def test_images_of_another_size_are_a_finding(linear):
    (finding, *rest) = look(linear, torch.rand(60, 3, 16, 16), Y[:60])
    assert finding.name == "forward"
    assert "fails on images of 3 x 16 x 16: RuntimeError" in finding.what
    assert {f.severity for f in rest} == {"skipped"}


# The command line ----------------------------------------------------------------------------------------------------

OWN = """
import torch
from torch import nn

def bright():
    \"\"\"Classes by the brightness of the image's first quarter, as in bright_data.\"\"\"
    net = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(4, 2))
    net[2].weight.data = torch.tensor([[-20.0, 0, 0, 0], [20.0, 0, 0, 0]])
    net[2].bias.data = torch.tensor([10.0, -10.0])
    return net

def soft(): return nn.Sequential(bright(), nn.Softmax(1))
def wrong(): return nn.Sequential(nn.Flatten(), nn.Linear(3, 2))
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder with modules of one's own, and images whose class is the brightness of their first quarter."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ADVEBM_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_models", raising=False)
    (tmp_path / "own_models.py").write_text(OWN)
    x = np.random.default_rng(0).integers(0, 256, (600, 8, 8, 1), dtype=np.uint8)
    np.savez(tmp_path / "bright.npz", x=x, y=(x[:, :4, :4].mean((1, 2, 3)) > 127.5).astype(np.int64))
    return ["--data", "npz:bright.npz", "--device", "cpu", "--threat.eps", "0.05"]


def call(*arguments, capsys):
    status = cli.main(["doctor", *map(str, arguments)])
    out, err = capsys.readouterr()
    return status, out, err


def test_the_command_line_on_ones_own_module(own, capsys):
    status, out, err = call("own_models:bright", *own, capsys=capsys)
    assert status == 0, out + err
    assert out.startswith("no faults found; checked:\n  outputs     It takes images in [0, 1]")
    assert len(out.splitlines()) == 1 + len(CHECKS)
    assert "own_models:bright on 120 test images of bright at linf 12.8/255" in err
    status, out, _ = call("own_models:soft", *own, capsys=capsys)
    assert status == 1
    assert out.startswith("fault: probabilities\n  found: all outputs lie in [0, 1]")
    assert re.search("^  to do: return logits", out, re.M)
    assert re.search("^skipped until that is mended: gradient, flat-loss", out, re.M)
    assert out.endswith("\n1 fault\n")
    status, out, _ = call("own_models:wrong", *own, "--json", "--images", 60, capsys=capsys)
    records = [json.loads(line) for line in out.splitlines()]
    assert status == 1
    assert [r["name"] for r in records][:2] == ["forward", "state"]
    assert set(records[0]) == {"name", "severity", "what", "fix"}


def test_the_command_line_on_a_run(small_run, capsys):
    """Its recipe gives images and threat; options change them."""
    status, out, err = call(small_run.folder, "--device", "cpu", "--images", 100, capsys=capsys)
    assert status == 0, out
    assert "on 100 test images of digits at l2 0.9" in " ".join(err.split())
    _, _, err = call(small_run.folder, "--device", "cpu", "--images", 60, "--threat.eps", 0.3, capsys=capsys)
    assert "on 60 test images of digits at l2 0.3" in " ".join(err.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["own_models:bright"], "own_models:bright says nothing of its images: give --data NAME"),
        (["own_models:bright", "--data.path", "x"], "give --data NAME"),
        (["own_models:nothing", "--data", "digits"], "'own_models:nothing' cannot be imported"),
        (["nowhere", "--data", "digits"], "there is no run or model at nowhere"),
        (["own_models:bright", "--data", "digitz"], "no source 'digitz'.*did you mean 'digits'"),
        (["own_models:bright", "--data", "digits", "--threat.eps", "8"], "write 8/255, not 8"),
        (["own_models:bright", "--data", "digits", "--images", "10"], "at least 50 images, got 10"),
        (["own_models:bright", "--data", "digits", "--images", "-5"], "at least 50 images, got 0"),
        (["own_models:bright", "--data", "digits", "--metrics", "fid"], "no option --metrics"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(own, capsys, arguments, message):
    status, out, err = call(*arguments, capsys=capsys)
    assert (status, out) == (2, "")
    assert re.search(message, err.strip().splitlines()[-1]), err
