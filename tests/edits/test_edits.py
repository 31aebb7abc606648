import math

import pytest
import torch
from scipy.optimize import minimize
from torch.nn.functional import avg_pool2d

from advebm import energies
from advebm.core.config import KINDS, build
from advebm.core.errors import UserError
from advebm.descent import Descent, both, box, means, unit
from advebm.edits.base import Edit, box_hole, join_parts
from advebm.edits.restore import Denoise, Inpaint, Upsample, median
from advebm.edits.transform import Compose, Counterfactual, Interpolate, Paint, Translate, spherical
from advebm.metrics.unusual import unusual
from advebm.samplers.classifier import CS, TA
from tests.helpers import Plain


@pytest.fixture
def hole():
    return box_hole((8, 8), 2, 3, 6, 7)


def test_held_pixels_stay_to_the_bit_and_the_rest_moves(net, batch, hole, generator):
    for edit in (*(Inpaint(steps=5, fill=fill) for fill in ("smooth", "mean", "noise")), Paint(steps=5)):
        found = edit(net, batch.x.float().double(), batch.y, hole=hole, generator=generator)
        known = ~hole.expand_as(batch.x)
        assert torch.equal(found.x[known], batch.x.float().double()[known])
        assert (found.x != found.begin)[~known].all()
        assert ((found.x >= 0) & (found.x <= 1)).all()


@pytest.mark.parametrize("edit", [Inpaint(), Paint(), Inpaint(radius=0.5)])
def test_the_constraint_alone_holds_them(batch, hole, edit, generator):
    problem = edit.make_problem(batch.x, hole.expand(6, 1, 8, 8), generator)
    elsewhere = torch.rand(batch.x.shape, dtype=torch.float64, generator=generator)
    assert torch.equal(problem.constraint(elsewhere, problem.origin)[:, :, ~hole], batch.x[:, :, ~hole])


def test_known_pixels_take_no_part_in_the_step(net, batch, hole):
    """A step of unit length is one in the hole alone."""
    found = Inpaint(steps=1, step_size=0.01, fill="mean")(net, batch.x, batch.y, hole=hole)
    torch.testing.assert_close((found.x - found.begin).flatten(1).norm(dim=1), torch.full((6,), 0.01).double())


def test_holes_begin_as_asked(batch, hole, generator):
    begin = {
        fill: Inpaint(fill=fill).make_problem(batch.x, hole[None, None], generator).start for fill in ("mean", "smooth")
    }
    known = batch.x[:, :, ~hole].mean(2)
    assert torch.allclose(begin["mean"][:, :, hole], known[:, :, None].expand(-1, -1, int(hole.sum())))
    u = begin["smooth"][0, 0]
    near = (u[2:6, 2:6] + u[4:8, 2:6] + u[3:7, 1:5] + u[3:7, 3:7]) / 4
    torch.testing.assert_close(u[3:7, 2:6], near, atol=1e-3, rtol=0)


EDITS = [Translate(steps=6), Inpaint(steps=6), Paint(steps=6), Upsample(steps=6, factor=2), Denoise(steps=6, sigma=0.2)]


@pytest.mark.parametrize("edit", EDITS, ids=lambda e: type(e).__name__)
def test_an_edit_lowers_its_energy_and_leaves_no_trace(net, batch, hole, edit):
    before = {k: v.clone() for k, v in net.state_dict().items()}
    x = avg_pool2d(batch.x, 2) if isinstance(edit, Upsample) else batch.x
    for y in (None, batch.y):
        found = edit(net, x, y, hole=hole if isinstance(edit, Inpaint | Paint) else None)
        assert (found.numbers["energy after"] < found.numbers["energy before"]).all()
        torch.testing.assert_close(found.numbers["distance"], (found.x - found.begin).flatten(1).norm(dim=1))
    net.eval()
    read = energies.joint if edit.energy == "joint" else energies.conditional
    if not isinstance(edit, Denoise):
        torch.testing.assert_close(found.numbers["energy after"], read(net(found.x), batch.y).detach())
    torch.testing.assert_close(
        found.numbers["confidence before"], net(found.begin).softmax(1)[torch.arange(6), batch.y]
    )
    assert torch.equal(found.film[:, 0], found.begin)
    assert torch.equal(found.film[:, -1], found.x)
    assert found.frame_steps == [0, 1, 2, 3, 4, 5, 6]
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())


class TestTranslate:
    @pytest.mark.parametrize(("energy", "sampler"), [("joint", CS), ("conditional", TA)])
    def test_is_the_descent_of_sampling_from_an_image(self, net, batch, energy, sampler):
        ours = Translate(steps=5, step_size=0.2, energy=energy)(net, batch.x, batch.y)
        torch.testing.assert_close(ours.x, sampler(steps=5, step_size=0.2)(net, batch.y, batch.x))

    def test_amount_is_how_far_it_goes(self, net, batch):
        at = lambda amount: Translate(steps=8, amount=amount)(net, batch.x, batch.y).x
        assert torch.equal(at(0), batch.x)
        assert torch.equal(at(0.5), Translate(steps=4)(net, batch.x, batch.y).x)
        assert torch.equal(at(2), Translate(steps=16)(net, batch.x, batch.y).x)

    def test_the_step_is_a_root_mean_square_of_half_a_hundredth(self, net, batch):
        found = Translate(steps=1)(net, batch.x * 0.8 + 0.1, batch.y)
        moved = (found.x - found.begin).square().mean((1, 2, 3)).sqrt()
        torch.testing.assert_close(moved, torch.full((6,), 0.005).double())

    def test_the_default_step_is_of_what_moves(self, net, batch, hole):
        masks = hole.expand(6, 1, 8, 8).clone()
        masks[0, 0, :7] = True  # another hole, another step
        found = Inpaint(steps=1, fill="mean")(net, batch.x, hole=masks)
        moved = (found.x - found.begin).square().sum((1, 2, 3)) / (3 * masks.sum((1, 2, 3)))
        torch.testing.assert_close(moved.sqrt(), torch.full((6,), 0.003).double())

    def test_by_a_critic(self, batch):
        critic = Plain(lambda x: -(x.flatten(1) - 0.5).square().sum(1, keepdim=True))
        found = Translate(steps=3, step_size=0.1)(critic, batch.x)
        towards = (0.5 - batch.x).flatten(1)
        expected = 0.3 * towards / towards.norm(dim=1, keepdim=True)
        torch.testing.assert_close((found.x - batch.x).flatten(1), expected)
        with pytest.raises(UserError, match="a critic has one energy and no classes"):
            Translate()(critic, batch.x, batch.y)

    def test_the_ball_holds(self, net, batch):
        found = Translate(steps=9, step_size=0.5, radius=0.7)(net, batch.x, batch.y)
        assert found.numbers["distance"].max() <= 0.7 + 1e-9


class TestMeans:
    def test_is_the_nearest_image_with_these_means(self, generator):
        origin = torch.rand(1, 1, 2, 2, dtype=torch.float64, generator=generator)
        for _ in range(10):
            x = 2 * torch.randn(1, 1, 2, 2, dtype=torch.float64, generator=generator)
            ours = means(2)(x, origin)
            same = {"type": "eq", "fun": lambda z: z.mean() - origin.mean().item()}
            far = lambda z, x=x: ((z - x.numpy().ravel()) ** 2).sum()
            theirs = minimize(far, origin.numpy().ravel(), bounds=[(0, 1)] * 4, constraints=[same], tol=1e-12).x
            torch.testing.assert_close(ours.flatten(), torch.from_numpy(theirs), atol=1e-5, rtol=0)

    @pytest.mark.parametrize("factor", [2, 4])
    def test_holds_to_a_millionth_in_float32(self, factor, generator):
        origin = torch.rand(3, 3, 8, 8, generator=generator).round(decimals=1)
        origin[0] = (origin[0] > 0.5).float()
        found = means(factor)(origin + torch.randn(origin.shape, generator=generator), origin)
        assert (avg_pool2d(found, factor) - avg_pool2d(origin, factor)).abs().max() < 1e-6
        assert found.min() >= 0
        assert found.max() <= 1

    def test_an_image_that_obeys_stays(self, batch):
        torch.testing.assert_close(means(4)(batch.x, batch.x), batch.x, atol=1e-6, rtol=0)


def test_a_larger_image_keeps_the_means_of_the_small_one(net, batch):
    small = avg_pool2d(batch.x, 4)
    found = Upsample(steps=10, factor=4)(net, small, batch.y)
    assert found.x.shape == batch.x.shape
    for z in (found.begin, found.x, *found.film.unbind(1)):
        assert (avg_pool2d(z, 4) - small).abs().max() < 1e-6
    assert (found.x - found.begin).abs().max() > 0.01


class TestCompose:
    def test_of_one_model_is_that_model(self, net, batch):
        y = torch.full((6,), 3)
        one = Compose(steps=5)([net], batch.x, [3])
        assert torch.equal(one.x, Paint(steps=5)(net, batch.x, y).x)
        free = Compose(steps=5)([net], batch.x, [None])
        assert torch.equal(free.x, Translate(steps=5)(net, batch.x).x)

    def test_is_the_weighted_sum(self, net, batch):
        other = Plain(lambda x: x.sum((1, 2, 3))[:, None] * 0.3)
        found = Compose(steps=3, step_size=0.1, weights=(2.0, -0.5, 1.0))([net, net, other], batch.x, [1, 2, None])
        net.eval()
        log_p = lambda x: net(x).log_softmax(1)
        energy = lambda x: -2 * log_p(x)[:, 1] + 0.5 * log_p(x)[:, 2] - other(x)[:, 0]
        torch.testing.assert_close(found.x, Descent(3, 0.1, unit, both(box()))(energy, batch.x))
        torch.testing.assert_close(found.numbers["energy after"], energy(found.x).detach())

    def test_takes_as_many_of_each(self, net, batch):
        with pytest.raises(UserError, match="got 1, 2 and 1"):
            Compose()([net], batch.x, [1, 2])


class TestInterpolate:
    def test_a_spherical_way_ends_at_its_ends_and_keeps_the_norm(self, generator):
        a, b = (torch.randn(1, 3, 4, 4, dtype=torch.float64, generator=generator) for _ in range(2))
        a, b = (0.5 + z / z.norm() for z in (a, b))
        t = torch.linspace(0, 1, 7, dtype=torch.float64)
        way = spherical(a.expand(7, -1, -1, -1), b.expand(7, -1, -1, -1), t)
        torch.testing.assert_close(way[:1], a)
        torch.testing.assert_close(way[-1:], b)
        offset = (way - 0.5).flatten(1)
        torch.testing.assert_close(offset.norm(dim=1), torch.ones(7).double())
        turns = (offset[1:] * offset[:-1]).sum(1).arccos()
        torch.testing.assert_close(turns, turns[:1].expand(6))

    def test_norms_go_evenly_and_flat_cases_are_straight(self):
        a, b = torch.full((3, 1, 1, 2), 0.5), torch.full((3, 1, 1, 2), 0.5)
        a[:, 0, 0, 0], b[:, 0, 0, 1] = 0.6, 0.9
        t = torch.tensor([0.0, 0.5, 1.0])
        torch.testing.assert_close((spherical(a, b, t) - 0.5).flatten(1).norm(dim=1), torch.tensor([0.1, 0.25, 0.4]))
        opposite = torch.full((3, 1, 1, 2), 0.5)
        opposite[:, 0, 0, 0] = 0.4
        torch.testing.assert_close(spherical(a, opposite, t), torch.lerp(a, opposite, t.view(3, 1, 1, 1)))
        torch.testing.assert_close(spherical(a, a, t), a)

    @pytest.mark.parametrize(("options", "size"), [({"step_size": 0.01}, 0.01), ({}, 0.002 * 64**0.5)])
    def test_steps_fade_towards_ends_that_are_held(self, options, size):
        """Unit steps on a linear energy go sin(πt) of their size, those of seeds all of it."""
        linear = Plain(lambda x: -x.flatten(1).sum(1, keepdim=True))  # a critic of E(x) = Σ x
        x = torch.full((3, 1, 8, 8), 0.5)
        for ends, share in (("held", [0, 2**-0.5, 1, 2**-0.5, 0]), ("moved", [1.0] * 5)):
            found = Interpolate(steps=3, count=5, ends=ends, **options)(linear, x)
            expected = 3 * size * torch.tensor(share * 2, dtype=torch.float64)
            torch.testing.assert_close(found.numbers["distance"], expected, rtol=1e-4, atol=1e-6)

    def test_given_images_stay_and_seeds_move(self, net, batch):
        found = Interpolate(steps=3, count=5)(net, batch.x[:3])
        assert found.x.shape == (10, 3, 8, 8)
        for at, i in ((0, 0), (4, 1), (5, 1), (9, 2)):
            assert torch.equal(found.x[at], batch.x[i])
        assert (found.numbers["energy after"] < found.numbers["energy before"])[[1, 2, 3, 6, 7, 8]].all()
        seeds = Interpolate(steps=3, count=5, ends="moved")(net, batch.x[:2])
        step = 0.002 * 192**0.5
        torch.testing.assert_close(seeds.x[[0, -1]], Translate(steps=3, step_size=step)(net, batch.x[:2]).x)

    def test_classes_go_from_one_to_the_next(self, net, batch):
        found = Interpolate(steps=2, count=5, way="linear", ends="moved")(net, batch.x[:2], torch.tensor([1, 4]))
        net.eval()
        for at, t in ((1, 0.25), (2, 0.5), (4, 1.0)):
            begin = torch.lerp(batch.x[0], batch.x[1], t)[None]
            energy = lambda x, t=t: (t - 1) * net(x)[:, 1] - t * net(x)[:, 4]
            size = 0.002 * begin.numel() ** 0.5
            torch.testing.assert_close(found.x[at : at + 1], Descent(2, size, unit, box())(energy, begin))


class TestDenoise:
    @pytest.mark.parametrize("prior", [0.5, 2.0])
    def test_of_a_gaussian_is_its_posterior_mean(self, prior):
        """For E = ‖x - m‖² / 2s² the minimum is the mean of b and m, weighted by 1/σ² and λ/s²."""
        m, s, sigma = 0.3, 0.2, 0.1
        model = Plain(lambda x: -(x - m).square().flatten(1).sum(1) / (2 * s**2))
        noisy = torch.tensor([0.6, 0.2, 0.45, 0.5], dtype=torch.float64).view(1, 1, 2, 2)
        found = Denoise(steps=60, sigma=sigma, prior=prior)(model, noisy).x
        expected = (noisy / sigma**2 + prior * m / s**2) / (1 / sigma**2 + prior / s**2)
        torch.testing.assert_close(found, expected)

    def test_without_a_prior_nothing_changes(self, net, batch):
        torch.testing.assert_close(Denoise(prior=0.0)(net, batch.x).x, batch.x)

    def test_salt_and_pepper_are_found_and_all_else_held(self, net):
        ramp = torch.linspace(0.2, 0.8, 8, dtype=torch.float64).expand(1, 3, 8, 8).clone()
        noisy = ramp.clone()
        noisy[:, :, 2, 3], noisy[:, :, 5, 1], noisy[:, 0, 6, 6] = 0.0, 1.0, 1.0  # the last is a colour
        found = Denoise(noise="salt-and-pepper", steps=4)(net, noisy)
        moved = (found.x != noisy).any(1)[0]
        assert moved.nonzero().tolist() == [[2, 3], [5, 1]]
        torch.testing.assert_close(found.begin[:, :, moved], ramp[:, :, moved])

    def test_median_by_hand(self):
        x = torch.arange(9.0).view(1, 1, 3, 3) / 9
        assert median(x)[0, 0, 1, 1].item() == pytest.approx(4 / 9)
        assert median(x)[0, 0, 0, 0].item() == pytest.approx(1 / 9)  # 0 four times, 1 twice, 3 twice, 4

    def test_steps_shrink_as_asked(self):
        model = Plain(lambda x: -x.square().flatten(1).sum(1))  # ∇E = 2x
        noisy = torch.tensor([0.6, 0.2, 0.45, 0.5], dtype=torch.float64).view(1, 1, 2, 2)
        found = Denoise(steps=2, sigma=0.5, prior=3.0, step_size=0.02, step_decay=0.25)(model, noisy).x
        x = noisy
        for size in (0.02, 0.01):
            x = x - size * (3.0 * 2 * x + (x - noisy) / 0.25)
        torch.testing.assert_close(found, x)


class TestCounterfactual:
    @pytest.fixture
    def linear(self, generator):
        w = torch.randn(3, 27, dtype=torch.float64, generator=generator)
        return w, Plain(lambda x: 0.8 * x.flatten(1) @ w.T)

    def test_is_as_near_as_a_hyperplane(self, linear, generator):
        """Two classes of a linear network: p ≥ level where the margin reaches its logit."""
        w, _ = linear
        model = Plain(lambda x: x.flatten(1) @ w[:2].T)
        x = 0.4 + 0.2 * torch.rand(5, 3, 3, 3, dtype=torch.float64, generator=generator)
        found = Counterfactual(steps=30, searches=12, level=0.8)(model, x)
        own, goal = (found.numbers[k].long() for k in ("from", "to"))
        normal = w[goal] - w[own]
        distance = (math.log(4) - (normal * x.flatten(1)).sum(1)) / normal.norm(dim=1)
        assert found.numbers["reached"].all()
        assert (found.numbers["distance"] >= distance - 1e-9).all()
        torch.testing.assert_close(found.numbers["distance"], distance, rtol=0.01, atol=0)
        assert (found.numbers["confidence after"] >= 0.8).all()

    def test_what_it_says_is_what_is_there(self, linear, generator):
        _, model = linear
        x = torch.rand(6, 3, 3, 3, dtype=torch.float64, generator=generator)
        y = torch.tensor([0, 1, 2, 0, 1, 2])
        found = Counterfactual(radius=1.2, level=0.9)(model, x, y)
        n = found.numbers
        torch.testing.assert_close(n["distance"], (found.x - x).flatten(1).norm(dim=1))
        torch.testing.assert_close(n["confidence after"], model(found.x).softmax(1)[torch.arange(6), y])
        assert torch.equal(n["reached"].bool(), n["confidence after"] >= 0.9)
        assert torch.equal(n["to"].long(), y)
        assert torch.equal(n["from"].long(), model(x).argmax(1))
        assert n["distance"].max() <= 1.2 + 1e-9
        assert 0 < n["reached"].sum() < 6
        assert found.x.min() >= 0
        assert found.x.max() <= 1
        torch.testing.assert_close(found.series["distance"], torch.linspace(0, 1, 7) * n["distance"][:, None])
        torch.testing.assert_close(found.series["confidence"][:, -1], n["confidence after"])
        old = model(found.film[:, 3]).softmax(1)[torch.arange(6), n["from"].long()]
        torch.testing.assert_close(found.series["confidence in the old class"][:, 3], old)
        there = Counterfactual(radius=1.2, level=0.9)(model, found.x, y).numbers["distance"][n["reached"].bool()]
        assert (there == 0).all()

    def test_without_a_class_it_is_the_second_most_likely(self, net, batch):
        found = Counterfactual(steps=2, searches=1)(net, batch.x)
        net.eval()
        assert torch.equal(found.numbers["to"].long(), net(batch.x).argsort(1, descending=True)[:, 1])

    def test_steps_shrink_as_asked(self, generator):
        """Two classes of a linear network: every step has the same direction."""
        w = torch.randn(2, 27, dtype=torch.float64, generator=generator)
        x = torch.full((3, 3, 3, 3), 0.5, dtype=torch.float64)
        search = Counterfactual(steps=2, searches=1, level=0.999999, step_size=0.04, step_decay=0.25)
        found = search(Plain(lambda x: 0.01 * x.flatten(1) @ w.T), x)
        torch.testing.assert_close(found.numbers["distance"], torch.full((3,), 0.04 + 0.02, dtype=torch.float64))

    def test_takes_a_classifier(self, batch):
        with pytest.raises(UserError, match="a counterfactual takes a classifier"):
            Counterfactual()(Plain(lambda x: x.sum((1, 2, 3))), batch.x)


def test_how_unusual_an_image_is():
    model = Plain(lambda x: -x.sum((1, 2, 3)))  # E(x) = Σ x
    known = torch.tensor([0.1, 0.2, 0.3, 0.4]).view(4, 1, 1, 1)
    found = unusual(model, torch.tensor([0.05, 0.25, 0.9]).view(3, 1, 1, 1), known, batch=3)
    torch.testing.assert_close(found.score, torch.tensor([0.05, 0.25, 0.9]).double(), atol=1e-7, rtol=1e-6)
    assert found.share.tolist() == [0.0, 0.5, 1.0]


def test_images_do_not_depend_on_each_other(net, batch, hole):
    whole = Inpaint(steps=4)(net, batch.x, batch.y, hole=hole)
    parts = join_parts([Inpaint(steps=4)(net, batch.x[i : i + 3], batch.y[i : i + 3], hole=hole) for i in (0, 3)])
    torch.testing.assert_close(parts.x, whole.x)
    torch.testing.assert_close(parts.film, whole.film)
    assert parts.numbers.keys() == whole.numbers.keys()


def test_bytes_are_images(net, batch):
    x = (batch.x * 255).to(torch.uint8)
    found = Translate(steps=0)(net.float(), x)
    torch.testing.assert_close(found.x, x.float() / 255)


MASKS = [
    (torch.zeros(8, 8), "the mask is empty"),
    (torch.ones(8, 8), "the mask is full"),
    (torch.ones(4, 8), "the mask is 4 x 8, the images are 8 x 8"),
    (None, "inpainting takes a hole"),
]


@pytest.mark.parametrize(("mask", "message"), MASKS, ids=lambda v: str(v)[:20])
def test_masks_that_cannot_be_are_named(net, batch, mask, message):
    with pytest.raises(UserError, match=message):
        Inpaint()(net, batch.x, hole=mask)


@pytest.mark.parametrize("corners", [(0, 0, 9, 1), (3, 0, 3, 1), (-1, 0, 2, 2)])
def test_boxes_lie_in_the_image(corners):
    with pytest.raises(UserError, match="a box is left,top,right,bottom within 8 x 8 pixels"):
        box_hole((8, 8), *corners)
    assert box_hole((4, 6), 1, 2, 5, 3).nonzero().tolist() == [[2, 1], [2, 2], [2, 3], [2, 4]]


def test_images_and_classes_that_do_not_fit_are_named(net, batch):
    with pytest.raises(UserError, match="the network does not take images of 3 x 6 x 6"):
        Translate()(net, batch.x[..., :6, :6])
    with pytest.raises(UserError, match="a class of 0 to 4 for each of 6 images"):
        Translate()(net, batch.x, batch.y + 5)
    with pytest.raises(UserError, match="at least 2 images"):
        Interpolate()(net, batch.x[:1])


BAD = [
    ("translate", {"amount": -1}),
    ("translate", {"steps": -1}),
    ("translate", {"step_size": 0}),
    ("translate", {"step_decay": 0}),
    ("translate", {"radius": 0}),
    ("paint", {"energy": "marginal"}),
    ("inpaint", {"fill": "grey"}),
    ("upsample", {"factor": 1}),
    ("denoise", {"sigma": 0}),
    ("denoise", {"prior": -1}),
    ("denoise", {"off": 1}),
    ("interpolate", {"count": 1}),
    ("counterfactual", {"level": 1}),
    ("counterfactual", {"searches": 0}),
]


@pytest.mark.parametrize(("kind", "options"), BAD, ids=str)
def test_bad_edits_are_refused(kind, options):
    with pytest.raises(UserError):
        build({"kind": kind, **options}, "edit")


def test_the_base_class_is_no_edit(net, batch):
    with pytest.raises(NotImplementedError):
        Edit()(net, batch.x)
    assert set(KINDS["edit"]) >= {"translate", "inpaint", "denoise", "upsample", "compose", "counterfactual"}


class Encoder(Plain):
    encoder = True


EDITS = [
    lambda model, x: Translate(steps=1)(model, x, torch.zeros(len(x), dtype=torch.long)),
    lambda model, x: Compose(steps=1)([Plain(model.f), model], x, [1, 2]),
    lambda model, x: Interpolate(steps=1)(model, x),
    lambda model, x: Counterfactual(steps=1)(model, x),
    lambda model, x: unusual(model, x, x),
]


@pytest.mark.parametrize("edit", EDITS)
def test_encoders_have_no_classes_to_move_to(batch, edit):
    f = lambda x: x.flatten(1)[:, :5]
    edit(Plain(f), batch.x)
    with pytest.raises(UserError, match="the model is an encoder, which has no logits; advebm probe"):
        edit(Encoder(f), batch.x)
