"""Everything on another device: no tensor of the host meets one of the device, and results equal the CPU's to the bit.

The device is the tagged one of tests/tagged_device.py, which says what it cannot see.  Kinds are taken from ``KINDS``,
so that a new one is tested without being named here.  ``ADVEBM_TEST_DEVICE=cuda`` computes on a real device instead,
where numbers round otherwise, so that only the number and shapes of the results have to agree: ``make gpu-check``.
"""

import contextlib
import copy
import dataclasses
import io
import os

import numpy as np
import pytest
import torch
from torch import nn

from advebm import energies, recipes
from advebm.attacks.autoattack import AutoAttack
from advebm.attacks.projected import Attack
from advebm.core import checks, config, floats, rng
from advebm.core.config import KINDS
from advebm.core.errors import UserError
from advebm.data.augment import Augment
from advebm.data.ood_sets import draw_outliers
from advebm.data.sources import Digits, to_float
from advebm.diagnostics import cem_gradient, doctor, landscape, paths, probes
from advebm.edits.transform import Compose
from advebm.evaluation.evaluate import evaluate_run
from advebm.metrics.base import SampleSet, Subject
from advebm.metrics.unusual import unusual
from advebm.metrics.verdicts import find_verdicts
from advebm.models import network
from advebm.models.ema import EMA
from advebm.models.inference import Backend, make_view
from advebm.models.network import Architecture
from advebm.models.small import SmallConv
from advebm.objectives.base import Context
from advebm.runs.checkpoint import weights
from advebm.runs.engine import Engine
from advebm.runs.find_space import feature_space
from advebm.runs.recipe import resolve
from advebm.sampling import generate
from advebm.sampling.job import SampleJob, draw_set
from advebm.starts import CompactGaussians
from advebm.training.loop import train
from tests.helpers import default, tiny
from tests.kinds import batch_of, build, kinds, place, shorten
from tests.tagged_device import tagged_device


@pytest.fixture(params=["float64", "no float64"])
def narrow(request, monkeypatch):
    """Whether the device has no float64."""
    if request.param == "no float64":
        monkeypatch.setattr(floats, "NO_FLOAT64", {"cuda"})
    return request.param == "no float64"


REAL = os.environ.get("ADVEBM_TEST_DEVICE")
tagged_only = pytest.mark.skipif(REAL is not None, reason="a real device says other things")


def agree(compute, *, narrow=False):
    """Compute on both devices; the results, which may be nested, have to be equal.

    A device that has no float64 rounds otherwise: there it is enough that nothing asks for it.
    """
    if REAL is not None:
        cpu, other = ([getattr(part, "shape", 0) for part in flat(compute(device))] for device in ("cpu", REAL))
        assert cpu == other
        return None
    if narrow:
        with tagged_device(float64=False):
            return compute("cuda")
    results = []
    for device in ("cpu", "cuda"):
        with tagged_device():  # also for the CPU, as torch takes other kernels where operators are watched
            results.append(list(flat(compute(device))))
    cpu, other = results
    assert cpu
    assert len(cpu) == len(other)
    for a, b in zip(cpu, other, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, (a, b)


def flat(thing):
    """Tensors, numbers and texts in a result."""
    if isinstance(thing, torch.Tensor):
        yield thing.detach().nan_to_num() if thing.is_floating_point() else thing.detach()
    elif isinstance(thing, dict):
        for value in thing.values():
            yield from flat(value)
    elif isinstance(thing, tuple | list):
        for value in thing:
            yield from flat(value)
    elif dataclasses.is_dataclass(thing):
        yield from flat([getattr(thing, f.name) for f in dataclasses.fields(thing)])
    elif thing is not None:
        yield thing if thing == thing else "nan"


@tagged_only
def test_the_tagged_device_refuses_what_cuda_refuses():
    with tagged_device():
        x, host = torch.rand(4, 3, device="cuda"), torch.rand(4, 3)
        refused = {
            "same device": [
                lambda: x + host,
                lambda: torch.cat([x, host]),
                lambda: torch.stack([x[0, 0], host[0, 0]]),
                lambda: x.gather(1, torch.zeros(4, 1, dtype=torch.long)),
                lambda: host + x[0, 0],
                lambda: nn.Linear(3, 2)(x),
                lambda: nn.Linear(3, 2).to("cuda")(host),
                lambda: x.index_put((torch.tensor([0]),), host[:1]),
            ],
            "indexed tensor": [lambda: host[torch.tensor([0], device="cuda")]],
            "generator": [
                lambda: torch.rand(2, device="cuda", generator=torch.Generator()),
                lambda: torch.rand(2, generator=torch.Generator("cuda")),
                lambda: x.normal_(generator=torch.Generator()),
            ],
            "numpy": [x.numpy, lambda: np.asarray(x)],
        }
        for message, calls in refused.items():
            for call in calls:
                with pytest.raises((RuntimeError, TypeError), match=message):
                    call()
        kept = [x + 2, x + torch.tensor(2.0), x[torch.tensor([0, 1])], x.clone(), copy.deepcopy(x), x.to(host.dtype)]
        kept += [torch.zeros_like(x), x.new_tensor([1.0]), x.T[0], torch.where(x > 0, x, 0.0), x.to(torch.float64)]
        assert {t.device.type for t in kept} == {"cuda"}
        moved = host.to(x)
        moved += 1
        assert moved.device.type == "cuda"
        assert x.cpu().device.type == host.device.type == "cpu"
        file = io.BytesIO()
        torch.save(x, file)
    file.seek(0)
    with pytest.raises(RuntimeError, match="CUDA"):
        torch.load(file)


@kinds("objective")
def test_objectives(role, kind, plain, data, networks, tmp_path, narrow):
    """Two steps, a checkpoint of the state that a CPU could load, and one step more."""
    objective = build(role, kind, plain)
    if kind == "rst":
        folder = tmp_path / "teacher"
        folder.mkdir(exist_ok=True)
        network.save(
            folder, networks["classifier"], Architecture(SmallConv(width=4), 10, 1, 8, (0.3,), (0.4,)), title="t"
        )
        objective = dataclasses.replace(objective, teacher=str(folder))
    backbone = SmallConv(width=4, norm="dual" if objective.hidden is not None else "batch")
    outputs = (objective.outputs or 10, 1, 8, (0.3,), (0.4,), objective.hidden)
    original = Architecture(backbone, *outputs).build()

    def compute(device):
        model, batch = place(original, device).train(), batch_of(data, 8, device)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        fresh = lambda: objective.init(torch.empty(8, *data.shape), rng.generator("state"))
        state, terms = fresh(), []
        for step in range(3):
            ctx = Context(rng.generator("step", step, device=device), images=8 * step)
            found = objective.search(model, batch, state, ctx)
            loss = objective.loss(model, batch, found, state, ctx)
            assert {t.device.type for t in (loss.total, *loss.terms.values())} == {device}
            optimizer.zero_grad()
            loss.total.backward()
            optimizer.step()
            objective.after(model, batch, found, state, loss, ctx)
            moved = objective.adversarial(batch, found)
            assert moved is None or moved.device.type == device
            terms.append(dict(loss.terms))
            if step == 1 and state is not None:
                file = io.BytesIO()
                torch.save(state.state_dict(), file)
                file.seek(0)
                state = fresh()
                state.load_state_dict(torch.load(file, weights_only=True, map_location="cpu"))
        return terms, dict(model.state_dict())

    agree(compute, narrow=narrow)


@kinds("sampler")
def test_samplers(role, kind, plain, data, networks, narrow):
    sampler = build(role, kind, plain)
    name = "encoder" if sampler.encoder else "critic" if kind == "ascent" else "classifier"
    y = torch.arange(10) if sampler.conditional or sampler.start == "class" else torch.full((10,), -1)

    def compute(device):
        model = place(networks[name], device)
        drawn = generate.generate(model, sampler, data, y, outside=data).x
        film, _ = generate.draw_trajectory(model, sampler, data, outside=data, frames=3)
        assert drawn.device.type == film.device.type == "cpu"
        return drawn, film

    agree(compute, narrow=narrow)


@pytest.mark.parametrize("by_class", [True, False])
def test_gaussians_that_published_models_bring(by_class, data):
    start = CompactGaussians.fit(data.train.x.repeat(3, 1, 1, 1), data.train.y.repeat(3), classes=10)
    y = torch.arange(10)

    def compute(device):
        x, draws = torch.empty(10, *data.shape, device=device), rng.generator("draws", device=device)
        drawn = start.start(by_class=by_class)(x, y.to(device), draws)
        assert drawn.device.type == device
        return drawn

    agree(compute)


@kinds("edit")
def test_edits(role, kind, plain, data, networks, narrow):
    edit = build(role, kind, plain)
    x, y = data.test.x[:4], data.test.y[:4].roll(1)
    if kind == "upsample":
        x = torch.nn.functional.avg_pool2d(to_float(x), edit.factor)
    hole = torch.zeros(8, 8, dtype=torch.bool)
    hole[2:5, 3:6] = True

    def compute(device):
        model = place(networks["classifier"], device)
        if isinstance(edit, Compose):
            return edit([model, place(networks["critic"], device)], x, [3, None])
        draws = rng.generator("edit", device=device)
        mask = None if kind == "upsample" else hole
        return [edit(model, x, goal, hole=mask, generator=draws) for goal in (None, y)]

    agree(compute, narrow=narrow)


@kinds("adversary")
def test_attacks(role, kind, plain, data, networks, monkeypatch, narrow):
    attack, long = build(role, kind, plain), AutoAttack.attacks
    short = lambda parts: [config.build(shorten(config.describe(part)), role) for part in parts]
    monkeypatch.setattr(AutoAttack, "attacks", lambda self, classes: short(long(self, classes)))

    def compute(device):
        model = place(networks["classifier"], device)
        x = to_float(data.test.x).to(device)
        y = model(x).argmax(1)  # so that every image is attacked
        x_adv = attack(model, x, y, rng.generator("attack", device=device))
        assert x_adv.device.type == device
        return x_adv, attack(model, x, y)

    agree(compute, narrow=narrow)


@kinds("metric")
@pytest.mark.filterwarnings("ignore")  # of few images
def test_metrics(role, kind, plain, data, networks, narrow):
    metric = build(role, kind, plain)

    def compute(device):
        model = place(networks["classifier"], device)
        samples = {"cs": SampleSet(to_float(data.val.x), data.val.y, {})}
        subject = Subject(
            model, data, data.test, Attack(steps=2), samples=samples, features=feature_space("own", model), batch=5
        )
        records = metric(subject, rng.generator("metric", device=device))
        return [(r.name, r.value, r.error, r.series) for r in records]

    agree(compute, narrow=narrow)


@kinds("score")
def test_scores(role, kind, plain, data, networks, narrow):
    score = build(role, kind, plain)

    def compute(device):
        values = score(place(networks["classifier"], device), to_float(data.test.x).to(device))
        assert values.device.type == device
        return values

    agree(compute, narrow=narrow)


@kinds("outlier", skip=KINDS["source"])
def test_noises(role, kind, plain, data):
    agree(lambda device: draw_outliers(build(role, kind, plain), data, 9, rng.generator("x", device=device)))


@kinds("backbone", skip=("own", "timm", "transformers", "robustbench"))
def test_backbones(role, kind, plain, tmp_path):
    """Training mode, a folded view, an average, and weights that were saved on the device."""
    plain = config.describe(default(role, kind))
    small = {
        "width": 4,
        "depth": {"wide-resnet": 10, "preact-resnet": 18}.get(kind, 8),
        "blocks": [1, 1, 1, 1],
        "widths": [4, 4, 4],
    }
    backbone = config.build({**plain, **{k: v for k, v in small.items() if k in plain}}, role)
    size = 16 if kind == "stargan" else 8
    architecture = Architecture(backbone, 3, 1, size, (0.3,), (0.4,))

    def compute(device):
        model, x = architecture.build().to(device), torch.rand(2, 1, size, size, generator=rng.generator(0)).to(device)
        average = EMA(model, 10)
        model.train()(x).sum().backward()
        average.update(model, 100, 2)
        model.eval()
        view, path = make_view(model, x, Backend()), tmp_path / device
        outputs = [model(x), average.module(x), *([] if view is None else [view.refresh()(x)])]
        assert {out.device.type for out in outputs} == {device}
        path.mkdir(exist_ok=True)
        network.save(path, model, architecture, title="t")
        loaded, _ = network.load(path)
        assert {v.device.type for v in loaded.state_dict().values()} == {"cpu"}
        return outputs, loaded(x.cpu())

    agree(compute)


@kinds("optimizer")
def test_optimisers(role, kind, plain, networks):
    """Steps on the device, a state loaded from the host, and one step more."""
    optimizer = build(role, kind, plain)

    def compute(device):
        model = place(networks["classifier"], device)
        steps = optimizer.build(model.parameters())
        x = torch.rand(4, 1, 8, 8, generator=rng.generator("x", device=device), device=device)
        for turn in range(3):
            steps.zero_grad()
            model(x).logsumexp(1).mean().backward()
            steps.step()
            if turn == 1:
                file = io.BytesIO()
                torch.save(steps.state_dict(), file)
                file.seek(0)
                steps = optimizer.build(model.parameters())
                steps.load_state_dict(torch.load(file, weights_only=True, map_location="cpu"))
        return dict(model.state_dict())

    agree(compute)


@pytest.mark.parametrize(
    "augment",
    [
        Augment(crop=2, flip=True, cutout=3),
        Augment(scale=0.3, jitter=0.5, grey=0.2),
        Augment(policy="autoaugment"),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_augmentations(augment, channels, narrow):
    def compute(device):
        x = torch.rand(12, channels, 8, 8, generator=rng.generator("images")).to(device)
        out = augment(x, rng.generator("augment", device=device))
        assert out.device.type == device
        return out

    agree(compute, narrow=narrow)


LOOPS = {
    "digits-at": {"train.streams": 2},
    "digits-jem": {"objective.negatives.buffer": 32, "objective.negatives.steps": 2, "sampler.start": "buffer"},
    "digits-binary-at": {"outside": "noise", "objective.curriculum.window": 16, "sampler.start": "outside"},
    "digits-adversarial-infonce": {"objective.negatives.queue": 16},
    "digits-free": {"optimizer": "adam"},
}


def test_diagnostics(data, networks, narrow):
    def compute(device):
        model, x = place(networks["classifier"], device), to_float(data.test.x).to(device)
        y, draws = data.test.y.to(device), rng.generator("draws", device=device)
        negatives = cem_gradient.draw_langevin_negatives(model, x, steps=2, step_size=0.01, generator=draws)
        parts = cem_gradient.split_likelihood_gradient(model, x, y, negatives)
        energy = lambda v: energies.marginal(model(v))
        planes = []
        for along in ("random", "gradient", "pca"):
            first, second = landscape.directions(along, x, energy, draws, images=x)
            planes.append(landscape.plane(lambda rows: energy, x, first, second, reach=1.0, count=3))
        shapes = [landscape.measure_landscape(values, 1.0) for values in planes]
        sampler = config.build({"kind": "cs", "steps": 2}, "sampler")
        slopes = paths.slopes(model, sampler, y, x, draws)
        rated = unusual(model, data.val.x, data.test.x)
        return parts, planes, shapes, slopes, probes.invert(model, x, x.flip(0), steps=2, size=0.1)[1], rated

    agree(compute, narrow=narrow)


def test_the_doctor(networks, narrow):
    digits = Digits().load().val

    def compute(device):
        found = doctor.examine_split(place(networks["classifier"], device), digits, threat=Attack(steps=2), count=50)
        return [(f.name, f.severity, f.what) for f in found]

    agree(compute, narrow=narrow)


def test_verdicts_are_resumed_where_they_began(data, networks, tmp_path):
    """Images may lie on the host or with the network; verdicts in a folder are read again."""
    x, y, attack = to_float(data.test.x), data.test.y, Attack(eps=0.1, steps=2, restarts=2)

    def compute(device):
        model = place(networks["classifier"], device)
        return [
            find_verdicts(model, a, b, attack, seed=0, batch=7, folder=folder)
            for a, b in ((x, y), (x.to(device), y.to(device)))
            for folder in (None, tmp_path / device, tmp_path / device)
        ]

    agree(compute)


class Stopped(Exception):
    """What ends a run in the middle."""


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.filterwarnings("ignore")  # of few samples
def test_a_run_goes_on_and_is_sampled_and_measured_on_any_device(name, tmp_path):
    """Weights of a run that changed its device in the middle are those of one that did not, either way round."""
    short = {"train.images": 64, "train.batch": 16, "train.log_every": 16, "train.validate_every": 32}
    short |= {"train.checkpoint_every": 32, "train.validate_with": 6, "threat.steps": 2, "backbone.width": 4}
    short |= {"data.val": 0.02, "sampler.steps": 2}
    recipe = resolve(recipes.find(name), [*short.items(), *LOOPS[name].items()])

    def stop(images):
        if images == 48:
            raise Stopped

    digests, other = set(), REAL or "cuda"
    within = tagged_device if REAL is None else lambda loads=True: contextlib.nullcontext()
    for number, (first, second) in enumerate([("cpu", "cpu"), (other, "cpu"), ("cpu", other)]):
        folder = tmp_path / str(number)
        with within(), pytest.raises(Stopped):
            train(recipe, folder, device=first, tick=stop)
        with within(loads=second == other):
            run = train(recipe, folder, resume=True, device=second)
        digests.add(weights(run.checkpoints.path()))
    assert len(digests) == 1 or REAL
    results = []
    for device in ("cpu", other):
        job = SampleJob(run, device, recipe.sampler, per_class=1, device=device)
        with within():
            records = evaluate_run(run, recipe=dataclasses.replace(recipe, metrics=()), device=device)
            results.append((generate.read_set(draw_set(job)).x, records))
    assert torch.equal(results[0][0], results[1][0]) or REAL


@tagged_only
def test_names_of_devices(monkeypatch):
    """A wrong name is answered with what there is; one of several GPUs may be chosen."""
    for name in ("gpu", "cuda:x", "meta", "mps", "0", "cpu:cuda"):
        with pytest.raises(UserError, match=f"no device '{name}' here; there is cpu$"):
            checks.device(name)
    assert checks.device() == checks.device("cpu") == checks.device("cpu:0") == "cpu"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="there is cpu, cuda, cuda:1; cuda is the first of 2 GPUs"):
        checks.device("gpu")
    with tagged_device():
        for name in ("cuda", "cuda:1"):
            assert checks.device(name) == name
            assert Engine(name).device == torch.device(name)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert checks.device() == "cuda"
    assert Engine("cpu").device == torch.device("cpu")


@tagged_only
def test_a_device_without_float64_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(floats, "NO_FLOAT64", {"cuda"})
    with tagged_device(float64=False), pytest.raises(UserError, match="has no float64; set --train"):
        train(tiny(train__precision="float64"), tmp_path / "run", device="cuda")
    assert not (tmp_path / "run").exists()
    assert floats.widest(torch.device("cpu")) == torch.float64
