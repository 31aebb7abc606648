"""Diagnostics against closed forms: quadratic energies, linear networks, planted copies."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from advebm.cli import main
from advebm.core.errors import UserError
from advebm.diagnostics import landscape, paths, probes
from advebm.metrics import similarity
from advebm.models.network import Network, Normalize
from advebm.reporting import figure_store
from advebm.reporting.build import report
from advebm.reporting.diagnostics import FIGURES
from advebm.runs.run import Run
from advebm.samplers.classifier import CS, TA, Langevin
from advebm.training.loop import train
from tests.helpers import Plain, tiny
from tests.references import similarity as reference


def quadratic(centres, curvature):
    """½ c ‖x - μ_i‖² for each image."""
    return lambda index: lambda x: 0.5 * curvature * (x - centres[index]).flatten(1).square().sum(1)


class TestLandscape:
    def test_a_quadratic_lies_where_it_should(self, generator):
        """Planted offsets 0.3 along the first and -0.4 along the second direction; curvature 7; 0.5 pixels away."""
        x = torch.rand(3, 1, 4, 4, dtype=torch.float64, generator=generator)
        first, second = landscape.directions("random", x, lambda v: v.sum((1, 2, 3)), generator)
        energy = quadratic(x + 0.3 * first - 0.4 * second, 7.0)
        values = landscape.plane(energy, x, first, second, reach=1.0, count=21)
        assert values.shape == (3, 21, 21)
        assert values[:, 10, 10].abs().max() == 0
        a, b = 0.1 * (torch.arange(21) - 10).view(-1, 1), 0.1 * (torch.arange(21) - 10)
        expected = 3.5 * ((a - 0.3) ** 2 + (b + 0.4) ** 2 - 0.25)
        torch.testing.assert_close(values, expected.double().expand(3, -1, -1), rtol=1e-6, atol=1e-6)
        found = landscape.measure_landscape(values, 1.0)
        torch.testing.assert_close(found.offset, torch.full((3,), 0.5, dtype=torch.float64))
        torch.testing.assert_close(found.curvature, torch.full((3,), 7.0, dtype=torch.float64), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found.tilt, torch.full((3,), 3.5, dtype=torch.float64), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found.depth, torch.full((3,), 0.875, dtype=torch.float64), rtol=1e-6, atol=1e-6)
        assert not found.edge.any()
        near = landscape.measure_landscape(landscape.plane(energy, x, first, second, reach=0.2, count=5), 0.2)
        assert near.edge.all()

    def test_points_go_through_the_network_together(self, generator):
        """As many as their size allows, 500 of these; each with its own image's energy."""
        x = torch.rand(2, 1, 4, 4, dtype=torch.float64, generator=generator)
        first, second = landscape.directions("random", x, lambda v: v.sum((1, 2, 3)), generator)
        energy, sizes = quadratic(x + torch.tensor([0.0, 1.0]).view(2, 1, 1, 1) * first, 2.0), []

        def counted(index):
            sizes.append(len(index))
            return energy(index)

        values = landscape.plane(counted, x, first, second, reach=1.0, count=25)
        assert sizes == [500, 500, 250]
        for image in range(2):
            for a, b in ((0, 0), (3, 20), (24, 12)):
                point = x[image] + (a - 12) / 12 * first[image] + (b - 12) / 12 * second[image]
                target = x[image] + image * first[image]
                expected = (point - target).square().sum() - (x[image] - target).square().sum()
                assert values[image, a, b] == pytest.approx(expected.item(), abs=1e-6)

    @pytest.mark.parametrize("along", ["random", "gradient", "pca"])
    def test_directions_are_orthonormal(self, along, generator):
        x = torch.rand(4, 2, 3, 3, generator=generator)
        images = torch.rand(50, 2, 3, 3, generator=generator)
        weight = torch.randn(2, 3, 3, generator=generator)
        images[:, 0, 0, 0] = torch.linspace(0, 30, 50)  # the first component
        energy = lambda v: (v * weight).sum((1, 2, 3))
        first, second = landscape.directions(along, x, energy, generator, images=images)
        for direction in (first, second):
            torch.testing.assert_close(direction.flatten(1).norm(dim=1), torch.ones(4))
        assert (first * second).flatten(1).sum(1).abs().max() < 1e-5
        if along == "gradient":
            torch.testing.assert_close(first[0], weight / weight.norm())
        if along == "pca":
            assert first[:, 0, 0, 0].abs().min() > 0.999

    def test_principal_components_are_exact(self, generator):
        """Also where their variances are close, and the same from call to call."""
        images = torch.rand(40, 2, 3, 3, generator=generator)
        calls = [landscape.directions("pca", images[:1], lambda v: v.sum(), generator, images=images) for _ in range(2)]
        centred = (images - images.mean(0)).flatten(1).double().numpy()
        exact = np.linalg.svd(centred, full_matrices=False)[2][:2]
        for one, two, axis in zip(*calls, exact, strict=True):
            assert torch.equal(one, two)
            assert abs(one.flatten().double().numpy() @ axis) == pytest.approx(1, abs=1e-6)

    def test_mistakes(self, generator):
        x = torch.rand(1, 1, 2, 2)
        with pytest.raises(UserError, match="odd number of points"):
            landscape.plane(quadratic(x, 1.0), x, x, x, reach=1, count=4)
        with pytest.raises(UserError, match="at least 3 images"):
            landscape.directions("pca", x, lambda v: v.sum(), generator, images=x)


class TestPaths:
    def test_slopes_of_linear_logits(self, generator):
        """f_k = s_k·x: ‖∇E(x, y)‖ = ‖s_y‖, ∇E(x) = -Σ p_k s_k."""
        weight = torch.randn(3, 4, dtype=torch.float64, generator=generator)
        model = Plain(lambda x: x.flatten(1) @ weight.T)
        begin, y = torch.rand(2, 1, 2, 2, dtype=torch.float64, generator=generator), torch.tensor([0, 2])
        found = paths.slopes(model, CS(steps=3, step_size=0.01), y, begin, generator)
        assert found.joint.shape == (3, 2)
        torch.testing.assert_close(found.joint, weight[y].norm(dim=1).expand(3, 2))
        p = (begin.flatten(1) @ weight.T).softmax(1)
        torch.testing.assert_close(found.marginal[0], (p @ weight).norm(dim=1))
        share = found.joint / (found.joint + found.marginal)
        torch.testing.assert_close(found.share, share)
        with pytest.raises(UserError, match="a critic has one energy"):
            paths.slopes(Plain(lambda x: x.sum((1, 2, 3))), CS(steps=1), y, begin, generator)

    def test_a_chain_is_looked_at_where_it_is(self, generator):
        """E = ½‖x - c‖² / s by steps α: x_k - c = (1 - α/s)^k (x_0 - c)."""
        model = Plain(lambda x: -0.5 * (x - 0.5).square().sum((1, 2, 3)) / 0.1)
        begin = torch.rand(5, 1, 2, 2, dtype=torch.float64, generator=generator)
        sampler = Langevin(steps=20, step_size=0.01, direction="raw", noise=0.0)
        found = paths.chain(model, sampler, torch.full((5,), -1), begin, generator, looks=5)
        assert found.steps == [0, 5, 10, 15, 20]
        for i, k in enumerate(found.steps):
            x = 0.5 + 0.9**k * (begin - 0.5)
            torch.testing.assert_close(found.x[i], x)
            torch.testing.assert_close(found.energy[i], 5 * (x - 0.5).square().sum((1, 2, 3)))
            torch.testing.assert_close(found.slope[i], 10 * (x - 0.5).flatten(1).norm(dim=1))
        torch.testing.assert_close(found.strength(1.0), 1.0 - found.energy.mean(1))
        drift, error = found.drift()
        third, fourth = found.energy[2], (found.energy[3] + found.energy[4]) / 2
        assert drift == pytest.approx((fourth - third).mean().item())
        assert error == pytest.approx((fourth - third).std().item() / math.sqrt(5))

    def test_drift_of_a_settled_chain_is_noise(self):
        """Langevin dynamics begun in its own law N(½, 0.05²) has none; its share on the border is nil."""
        model = Plain(lambda x: -0.5 * (x - 0.5).square().sum((1, 2, 3)) / 0.05**2)
        begin = 0.5 + 0.05 * torch.randn(300, 1, 2, 2, generator=torch.Generator().manual_seed(0))
        sampler = Langevin(steps=200, step_size=0.05**2 / 20, direction="raw", temperature=1.0, noise=0.0)
        y = torch.full((300,), -1)
        found = paths.chain(model, sampler, y, begin, torch.Generator().manual_seed(1), looks=40)
        drift, error = found.drift()
        assert abs(drift) < 4 * error
        assert found.saturated.max() == 0
        assert found.x[-1].std().item() == pytest.approx(0.05, rel=0.1)

    def test_saturation(self):
        model = Plain(lambda x: x.sum((1, 2, 3)))
        found = paths.chain(
            model, Langevin(steps=8, step_size=1.0, noise=0.0, direction="raw"), torch.full((2,), -1),
            torch.rand(2, 1, 2, 2), torch.Generator(), looks=5,
        )  # fmt: skip
        assert found.saturated[0].max() == 0
        assert found.saturated[-1].min() == 1

    def test_seeds_between_seeds_are_distributed_as_their_ends(self, generator):
        a, b = 0.5 + 0.05 * torch.randn(2, 4000, 1, 2, 2, generator=generator)
        way = paths.between(a, b, torch.full_like(a, 0.5), 5)
        assert way.shape == (4000, 5, 1, 2, 2)
        torch.testing.assert_close(way[:, 0], a)
        torch.testing.assert_close(way[:, -1], b)
        for k in range(5):
            assert way[:, k].std().item() == pytest.approx(0.05, rel=0.03)
        with pytest.raises(UserError, match="at least its 2 ends"):
            paths.between(a, b, a, 1)


class TestProbes:
    def test_saliency_of_linear_logits_is_their_weight(self, generator):
        weight = torch.randn(3, 8, generator=generator)
        model = Plain(lambda x: x.flatten(1) @ weight.T)
        x, y = torch.rand(2, 2, 2, 2, generator=generator), torch.tensor([2, 0])
        torch.testing.assert_close(probes.saliency(model, x, y).flatten(1), weight[y])
        critic = Plain(lambda x: x.flatten(1) @ weight[0])
        torch.testing.assert_close(probes.saliency(critic, x, y).flatten(1), weight[0].expand(2, -1))

    def test_features_that_hold_everything_are_inverted(self, generator):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            linear = nn.Linear(8, 8)
            nn.init.orthogonal_(linear.weight)
        model = Network(Normalize((0.0, 0.0), (1.0, 1.0)), nn.Sequential(nn.Flatten(), linear), nn.Linear(8, 3))
        target, begin = torch.rand(2, 3, 2, 2, 2, generator=generator)
        x, left = probes.invert(model, target, begin)
        torch.testing.assert_close(x, target, rtol=0, atol=0.01)
        assert left.max() < 0.02

    def test_energies_of_sets(self):
        model = Plain(lambda x: torch.stack([x.sum((1, 2, 3)), x.sum((1, 2, 3))], 1))
        sets = {"bytes": torch.full((3, 1, 2, 2), 255, dtype=torch.uint8), "dark": torch.zeros(2, 1, 2, 2)}
        found = probes.populations(model, sets, batch=2)
        torch.testing.assert_close(found["bytes"], torch.full((3,), -4 - math.log(2), dtype=torch.float64))
        torch.testing.assert_close(found["dark"], torch.full((2,), -math.log(2), dtype=torch.float64))


class TestSimilarity:
    @pytest.mark.parametrize("size", [8, 13])
    def test_ssim_agrees_with_loops(self, size, generator):
        a, b = torch.rand(2, 3, 2, size, size, dtype=torch.float64, generator=generator)
        ours = similarity.ssim(a[:2], b)
        for i in range(2):
            for j in range(3):
                assert ours[i, j].item() == pytest.approx(reference.ssim(a[i].numpy(), b[j].numpy()), abs=1e-9)

    def test_ssim_of_an_image_with_itself_is_one_and_with_its_negative_below_zero(self, generator):
        x = torch.rand(3, 1, 16, 16, dtype=torch.float64, generator=generator)
        torch.testing.assert_close(similarity.ssim(x, x).diagonal(), torch.ones(3, dtype=torch.float64))
        assert (similarity.ssim(x, 1 - x).diagonal() < 0).all()
        with pytest.raises(UserError, match="one shape"):
            similarity.ssim(x, x[:, :, :8])

    def test_the_nearest_are_found_in_blocks(self, generator):
        x, others = torch.rand(4, 1, 8, 8, generator=generator), torch.rand(30, 1, 8, 8, generator=generator)
        others[17] = x[2]
        whole, blocks = (similarity.nearest(x, others, 5, block=block) for block in (30, 7))
        assert torch.equal(whole.which, blocks.which)
        order = torch.cdist(x.flatten(1), others.flatten(1)).argsort(1)[:, :5]
        assert torch.equal(whole.which, order)
        assert (whole.which[2, 0], whole.distance[2, 0]) == (17, 0)
        assert similarity.nearest(x, others, 1, similarity.dissimilarity).which[2, 0] == 17
        as_bytes = similarity.nearest((others[:4] * 255).round() / 255, (others * 255).round().to(torch.uint8), 1)
        assert as_bytes.which.flatten().tolist() == [0, 1, 2, 3]
        with pytest.raises(UserError, match="30 images to be near to, asked for 31"):
            similarity.nearest(x, others, 31)

    def test_copies_are_counted(self):
        held_out = torch.linspace(1, 2, 101)
        assert similarity.copies(torch.tensor([0.1, 0.2, 1.5, 1.6]), held_out)[0] == 0.5
        share, ratio = similarity.copies(held_out, held_out)
        assert share == pytest.approx(0.01, abs=0.005)
        assert ratio == 1


def test_ta_and_cs_slopes_are_taken_along_their_own_chains(net, batch, generator):
    one, other = (
        paths.slopes(net, sampler(steps=4, step_size=0.3), batch.y, batch.x, generator) for sampler in (TA, CS)
    )
    torch.testing.assert_close(one.joint[0], other.joint[0])
    assert not torch.allclose(one.joint[-1], other.joint[-1])
    assert net.training


@pytest.fixture
def runs(small_run, tmp_path):
    """The shared run under two other folders."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        for entry in small_run.folder.iterdir():
            if entry.name in ("config.yaml", "checkpoints", "env.json"):
                (tmp_path / name / entry.name).symlink_to(entry)
    return [Run(tmp_path / name) for name in ("one", "two")]


def test_diagnose_draws_every_figure_into_the_report(runs, capsys):
    arguments = ["--images", "20", "--steps", "12", "--sampler.steps", "3", "--device", "cpu"]
    assert main(["diagnose", *(str(run.folder) for run in runs), *arguments]) == 0
    out = capsys.readouterr().out
    hung = figure_store.load_figures(runs[0])
    assert {f["name"] for f in hung} == set(FIGURES)
    assert not figure_store.load_figures(runs[1])
    assert "offset of the minimum" in out
    one, two = (str(run.folder) for run in runs)
    for figure in hung:
        assert figure["picture"].startswith(b"\x89PNG")
        if figure["name"] != "neighbours":  # the same model twice
            assert figure["numbers"][one] == figure["numbers"][two]
    page = report(runs[0]).read_text()
    for figure in hung:
        assert figure["title"] in page


def test_diagnose_of_a_critic(tmp_path, capsys):
    recipe = tiny(
        "digits-binary-at",
        **{"train.images": 128, "objective.curriculum.steps": 2, "sampler.steps": 4, "outside.count": 300},
    )
    run = train(recipe, tmp_path / "run", device="cpu")
    assert main(["diagnose", str(run.folder), "--images", "12", "--steps", "10", "--device", "cpu"]) == 0
    assert {f["name"] for f in figure_store.load_figures(run)} == set(FIGURES) - {"gradients"}
    arguments = ["--what", "energies", "--method", "langevin", "--sampler.start", "noise", "--images", "12"]
    assert main(["diagnose", str(run.folder), *arguments, "--device", "cpu"]) == 0
    (numbers,) = next(f["numbers"] for f in figure_store.load_figures(run) if f["name"] == "energies").values()
    assert any(name.startswith("outside: ") for name in numbers)  # though no chain begins there
    assert main(["diagnose", str(run.folder), "--what", "gradients", "--device", "cpu"]) == 2
    assert "a critic has one energy" in " ".join(capsys.readouterr().err.split())
    classifier = train(tiny("digits-at", **{"train.images": 128}), tmp_path / "classifier", device="cpu")
    assert main(["diagnose", str(classifier.folder), str(run.folder), "--device", "cpu"]) == 2
    assert "one of the runs is a critic; choose --method langevin" in " ".join(capsys.readouterr().err.split())


MISTAKES = {
    "what": (["--what", "lanscape"], "no diagnostic 'lanscape' (did you mean 'landscape'?)"),
    "images": (["--images", "1"], "--images must be at least 2, got 1"),
    "steps": (["--steps", "0"], "--steps must be at least 2, got 0"),
    "reach": (["--reach", "0"], "--reach must be > 0, got 0.0"),
    "along": (["--along", "up"], "random, gradient, pca"),
    "method": (["--method", "css"], "did you mean 'cs'"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_one_line(runs, capsys, case):
    arguments, message = MISTAKES[case]
    assert main(["diagnose", str(runs[0].folder), *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
