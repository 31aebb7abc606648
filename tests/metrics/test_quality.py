"""Score, overlap, Inception and feature spaces; numbers of other packages are those of tests/agreement/quality.py."""

import hashlib
import math
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import advebm
from advebm.attacks.projected import Attack
from advebm.core.errors import UserError
from advebm.data.sources import Data, Images
from advebm.evaluation import compare
from advebm.evaluation.evaluate import evaluate_run
from advebm.metrics import overlap
from advebm.metrics.base import Features, SampleSet, Subject
from advebm.metrics.distances import Moments, inception_score, kernel_distance
from advebm.metrics.keys import label
from advebm.metrics.overlap import Balls, density_coverage, hits, precision_recall
from advebm.metrics.quality import SampleQuality
from advebm.metrics.spaces import InceptionFeatures, Pixels
from advebm.models import inception
from advebm.reporting.records import class_tables
from advebm.runs.find_space import ClassifierFeatures, feature_space, find_space
from advebm.runs.run import Run
from advebm.workflows.sample import draw_set
from tests.helpers import few_samples
from tests.references import quality as reference

# The score ------------------------------------------------------------------------------------------------------------


def test_the_score_lies_between_one_and_the_number_of_classes():
    sure = 1000 * torch.eye(5).repeat(20, 1)  # each class is certain and as frequent as the others
    assert inception_score(sure, splits=4) == (pytest.approx(5), pytest.approx(0, abs=1e-12))
    assert inception_score(torch.randn(1, 5).repeat(20, 1), splits=2) == (pytest.approx(1), pytest.approx(0, abs=1e-12))
    assert inception_score(sure[:10], splits=10)[0] == pytest.approx(1)  # a split of one image


def test_the_score_agrees_with_loops(generator):
    logits = 3 * torch.randn(60, 7, generator=generator, dtype=torch.float64)
    expected = reference.inception_score(logits.numpy(), 6)
    assert inception_score(logits, splits=6) == pytest.approx(expected, rel=1e-10)
    assert expected[1] > 0.05


def test_the_score_of_images_in_the_order_of_their_classes_needs_a_shuffle():
    """Splits of one class each score 1; in a random order all classes are in every split."""
    logits = (30 * torch.eye(10)).repeat_interleave(100, 0)
    assert inception_score(logits)[0] == pytest.approx(1)
    shuffled = inception_score(logits, generator=torch.Generator().manual_seed(0))
    assert shuffled[0] > 9
    assert shuffled == inception_score(logits, generator=torch.Generator().manual_seed(0))


def test_the_score_of_splits_that_are_not_equal(generator):
    """Split i begins at image ⌊i N / splits⌋, as in the published code."""
    logits = torch.randn(11, 3, generator=generator)
    parts = [inception_score(part, splits=1)[0] for part in (logits[:2], logits[2:5], logits[5:8], logits[8:])]
    assert inception_score(logits, splits=4) == (pytest.approx(np.mean(parts)), pytest.approx(np.std(parts)))


def test_impossible_classes_do_not_spoil_the_score():
    """Probabilities that underflow to 0 count as 0."""
    logits = torch.tensor([[0.0, 1.0, -5000.0], [1.0, 0.0, -5000.0]])
    assert inception_score(logits, splits=1)[0] == pytest.approx(inception_score(logits[:, :2], splits=1)[0])


def test_the_score_of_one_class_is_one_and_says_so():
    with pytest.warns(UserWarning, match="the classifier has one class"):
        assert inception_score(torch.randn(20, 1)) == (1.0, 0.0)


# Overlap --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def clouds(generator):
    """Two sets of different size that overlap in part."""
    draw = lambda n, scale: scale * torch.randn(n, 4, generator=generator, dtype=torch.float64)
    return draw(50, 1.0), draw(33, 0.6) + 0.5


def test_radii_on_a_line():
    balls = Balls.around(torch.tensor([[0.0], [1.0], [3.0], [7.0]]), 2)
    assert balls.radii.tolist() == [3.0, 2.0, 3.0, 6.0]


def test_hits_on_a_line_include_the_surface():
    balls = Balls(torch.tensor([[0.0], [5.0]]).double(), torch.tensor([2.0, 4.0]).double(), 1)
    of_points, of_balls = hits(torch.tensor([[-2.0], [1.5], [2.5], [20.0]]), balls)
    assert (of_points.tolist(), of_balls.tolist()) == ([1, 2, 1, 0], [2, 2])


@pytest.mark.parametrize("block", [1024, 7])
def test_overlap_agrees_with_loops_whatever_the_blocks(clouds, block, monkeypatch):
    monkeypatch.setattr(overlap, "BLOCK", block)
    real, fake = clouds
    arrays = real.numpy(), fake.numpy()
    found = precision_recall(real, fake), density_coverage(real, fake)
    assert found[0] == pytest.approx(reference.precision_recall(*arrays, 3), rel=1e-12)
    assert found[1] == pytest.approx(reference.density_coverage(*arrays, 5), rel=1e-12)
    assert len({*found[0], *found[1]}) == 4
    assert precision_recall(fake, real) == pytest.approx(found[0][::-1])


def test_hits_of_parts_join_and_add(clouds):
    points, balls = clouds[0], Balls.around(clouds[1], 3)
    of_points, of_balls = hits(points, balls)
    parts = [hits(part, balls) for part in points.split(13)]
    assert torch.equal(torch.cat([p for p, _ in parts]), of_points)
    assert torch.equal(sum(b for _, b in parts), of_balls)
    parts = [hits(points, part) for part in balls.split([10, 23])]
    assert torch.equal(sum(p for p, _ in parts), of_points)
    assert torch.equal(torch.cat([b for _, b in parts]), of_balls)


def test_overlap_of_equal_and_of_distant_sets(clouds, generator):
    real, _ = clouds
    assert precision_recall(real, real) == (1, 1)
    assert density_coverage(real, real)[1] == 1
    assert precision_recall(real, real + 100) == density_coverage(real, real + 100) == (0, 0)
    same = torch.randn(2, 1000, 3, generator=generator, dtype=torch.float64)
    density, coverage = density_coverage(*same)
    assert density == pytest.approx(1, abs=0.1)
    assert coverage == pytest.approx(1 - 1 / 2**5, abs=0.02)  # Naeem et al.: the k nearest of 2 N are all of one set


def test_features_that_do_not_fit_are_refused():
    nan, two, three = torch.tensor([[math.nan, 1.0]]), torch.ones(9, 2), torch.ones(9, 3)
    for wrong in (nan, torch.ones(3), torch.tensor([[math.inf]])):
        for function in (Moments.of, inception_score, lambda f: Balls.around(f, 1), lambda f: kernel_distance(f, f)):
            with pytest.raises(UserError, match=r"finite and of shape \(N, D\)"):
                function(wrong)
    with pytest.raises(UserError, match="1 values that are NaN or infinite"):
        Moments.of(nan)
    with pytest.raises(UserError, match="of one dimension, got 9 x 2 and 9 x 3"):
        kernel_distance(two, three)
    with pytest.raises(UserError, match="of one dimension, got 3 and 2"):
        precision_recall(two, three)
    with pytest.raises(UserError, match="takes at least 6 features, got 5"):
        density_coverage(two[:5], two)
    with pytest.raises(UserError, match="at least as many images, got 9"):
        inception_score(two)


# Inception ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network():
    """With made-up weights."""
    made = inception.Inception()
    made.load_state_dict({k: torch.from_numpy(v) for k, v in reference.weights(made.state_dict()).items()})
    return made.requires_grad_(False).eval()


def test_names_and_shapes_are_those_of_the_published_file(network):
    """Digest of all entries of torch-fidelity 0.4.0's network."""
    lines = sorted(f"{name} {tuple(v.shape)}" for name, v in network.state_dict().items())
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert len(lines) == 566
    assert digest == "760681d791cb624e1bf7a2e802a68933dd17aa5e3109fcf498d9dfa521bc10d7"
    assert sum(p.numel() for p in network.parameters()) == 23_850_960
    assert {"Mixed_7c.branch3x3_2a.conv.weight (384, 384, 1, 3)", "fc.weight (1008, 2048)"} <= set(lines)


def test_features_and_logits_are_those_of_torch_fidelity(network):
    """Printed by tests/agreement/quality.py for the same made-up weights and image."""
    features = network(torch.from_numpy(reference.bytes_of((1, 3, 20, 26), seed=1)) / 255)
    assert features.shape == (1, 2048)
    expected = [2.6151075, 3.5372584, 0.9674950, 3.2004271, 0.0354680, 3.7457175, 0.4593762, 0.0]
    assert features[0, ::256].tolist() == pytest.approx(expected, abs=1e-4)
    logits = network.logits(features)
    expected = [-13.115266, -2.150797, 13.994950, 3.558327, 3.868321, 9.736920, 7.188438, 10.784636]
    assert logits[0, ::126].tolist() == pytest.approx(expected, abs=1e-3)


def test_inception_sees_bytes_one_image_at_a_time_and_grey_as_colour(network):
    x = torch.from_numpy(reference.bytes_of((2, 1, 9, 9), seed=2)) / 255
    features = network(x)
    assert torch.equal(features, network((x + 0.4 / 255).clamp(0, 1)))
    assert torch.equal(features, network(x.expand(-1, 3, -1, -1)))
    torch.testing.assert_close(features[1:], network(x[1:]), rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match=r"takes images \(B, 3, H, W\)"):
        network(torch.rand(1, 4, 9, 9))


@pytest.mark.parametrize("shape", [(4, 4), (5, 9), (13, 23), (40, 31), (17, 17)])
def test_resize_agrees_with_loops(shape):
    """Up and down, of sides that differ, and not at all; a pixel is not looked up at its centre."""
    x = 255 * torch.rand(shape, generator=torch.Generator().manual_seed(0))
    found = inception.resize(x[None, None], 17)[0, 0]
    np.testing.assert_allclose(found.numpy(), reference.resize(x.double().numpy(), 17), atol=1e-3)
    if shape == (17, 17):
        assert torch.equal(found, x)
    assert inception.resize(x[None, None]).shape == (1, 1, 299, 299)


@pytest.fixture
def weights(tmp_path, network, monkeypatch):
    """A file like the published one, a dict without counts of batches, whose digest is taken for the published one."""
    path = tmp_path / "weights.pth"
    torch.save({k: v for k, v in network.state_dict().items() if "num_batches" not in k}, path)
    monkeypatch.setattr(inception, "DIGEST", hashlib.sha256(path.read_bytes()).hexdigest()[:8])
    return path


def test_the_published_file_is_loaded_as_it_is(weights, network):
    state = torch.get_rng_state()
    loaded = inception.load(weights)
    assert torch.equal(torch.get_rng_state(), state)
    assert not loaded.training
    assert not any(p.requires_grad or p.is_meta for p in loaded.parameters())
    x = torch.rand(1, 3, 8, 8)
    assert torch.equal(loaded(x), network(x))


class Trap:
    """Unpickling it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_another_file_is_refused_before_it_is_read(tmp_path, monkeypatch):
    path, sprung = tmp_path / "weights.pth", tmp_path / "sprung"
    torch.save(Trap(sprung), path)
    with pytest.raises(UserError, match=r"weights.pth is not weights-inception-2015-12-05-6726825d.pth: its sha256 be"):
        inception.load(path)
    monkeypatch.setattr(inception, "DIGEST", hashlib.sha256(path.read_bytes()).hexdigest()[:8])
    with pytest.raises(pickle.UnpicklingError):
        inception.load(path)
    assert not sprung.exists()
    with pytest.raises(UserError, match=r"cannot read .*nowhere: No such file.*https://github.com/toshas/torch-fid"):
        inception.load(tmp_path / "nowhere")


def test_weights_are_downloaded_once(tmp_path, weights, monkeypatch):
    calls = []

    def download(url, to, digest, progress):
        calls.append((url, digest))
        shutil.copy(weights, to)

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for _ in range(2):
        inception.load()
    assert calls == [(inception.URL, inception.DIGEST)]
    (cached,) = (tmp_path / "home").rglob("*.pth")
    cached.write_bytes(b"cut short")
    with pytest.raises(UserError, match="delete it and download https"):
        inception.load()


def test_without_a_connection_the_file_and_where_to_get_it_are_named(tmp_path, monkeypatch):
    def download(*args, **options):
        raise OSError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(UserError, match=r"6726825d.pth \(sha256 6726825d…\) to .*no route.*--features inception:PATH"):
        inception.load()


# Spaces and records ---------------------------------------------------------------------------------------------------


def test_what_features_may_name(tmp_path):
    assert find_space("inception") == InceptionFeatures()
    assert find_space("inception:some/where.pth") == InceptionFeatures("some/where.pth")
    assert find_space("pixels") == Pixels()
    assert find_space("./pixels") == ClassifierFeatures("./pixels")
    assert find_space("hf:user/name") == ClassifierFeatures("hf:user/name")
    assert find_space("cifar10-infonce").load("cpu").classes[:2] == ("airplane", "automobile")
    assert find_space("hf:user/name").judge == "hf:user/name"
    assert find_space(tmp_path / "a").name == "features of a"
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "config.json").write_text("{}")
    assert find_space(tmp_path / "b").judge == str(tmp_path / "b")
    with pytest.raises(UserError, match="no option 'path'"):
        find_space("pixels:x")
    with pytest.raises(UserError, match="there is no run or model at"):
        find_space(tmp_path / "a").load("cpu")


def test_only_inception_gives_fid_its_name():
    assert [label(q, "inception") for q in ("FD", "KID", "class score")] == ["FID", "KID", "IS"]
    assert label("precision", "inception") == "precision (inception)"
    assert [label(q, "pixels") for q in ("FD", "class score")] == ["FD (pixels)", "class score (pixels)"]


def subject_of(train, samples, space, classes=("dark", "bright"), **options):
    """Training images and a set of samples, floats (N, 1, H, W); a sample's class is whether it is bright."""
    split = Images((train * 255).round().to(torch.uint8), (train.mean((1, 2, 3)) > 0.5).long())
    y = (samples.mean((1, 2, 3)) > 0.5).long()
    sets = {"some": SampleSet(samples, y, {"sampler": "made up"})}
    data = Data("made up", classes, split, split, split)
    return Subject(nn.Identity(), data, split, Attack(), sets, space, **options)


def bright(features):
    s = 4 * (features.mean(1) - 0.5)
    return torch.stack([-s, s], 1)


WHOLE = Features("the image", lambda x: x.flatten(1), bright)


@pytest.mark.parametrize("batch", [3, 500])
def test_records_of_sample_quality_by_loops(generator, batch):
    train, samples = torch.rand(2, 48, 1, 2, 2, generator=generator)
    train, samples = 0.7 * train, samples[:30]
    subject = subject_of(train, samples, WHOLE, batch=batch)
    records = {r.name: r for r in SampleQuality(groups=5)(subject, generator)}
    real, fake = (v.flatten(1).double().numpy() for v in (subject.split.float(), samples))
    precision, recall = reference.precision_recall(real, fake, 3)
    density, coverage = reference.density_coverage(real, fake, 5)
    expected = {"precision": precision, "recall": recall, "density": density, "coverage": coverage}
    for name, value in expected.items():
        record = records[f"{name} (the image)"]
        assert record.value == pytest.approx(value, rel=1e-6), name
        assert (record.count, record.settings["reference_count"]) == (30, 48)
        assert 0 < record.error < 0.3
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    score = records["class score (the image)"]
    mean, deviation = reference.inception_score(bright(samples.flatten(1))[order].double().numpy(), 5)
    assert (score.value, score.settings["deviation"]) == (pytest.approx(mean), pytest.approx(deviation))
    assert score.error == pytest.approx(deviation * math.sqrt(5 / 4) / math.sqrt(5))
    assert records["intended class (the image)"].value == 1
    assert len(records) == 8


def test_errors_of_precision_are_those_of_a_share(generator):
    """A jackknife of a mean over groups of one image is its standard error; here there are two images a group."""
    train, samples = torch.rand(2, 400, 1, 2, 2, generator=generator)
    (precision,) = (
        r
        for r in SampleQuality(groups=200)(subject_of(train, samples * 1.2 % 1, WHOLE), generator)
        if r.name.startswith("precision")
    )
    p = precision.value
    assert 0.5 < p < 1
    assert precision.error == pytest.approx(math.sqrt(p * (1 - p) / 400), rel=0.2)


def test_overlap_is_measured_on_so_many_at_most(generator):
    train, samples = torch.rand(2, 60, 1, 2, 2, generator=generator)
    records = {r.name: r for r in SampleQuality(groups=5, overlap=20)(subject_of(train, samples, WHOLE), generator)}
    assert records["recall (the image)"].count == 20
    assert records["recall (the image)"].settings["reference_count"] == 20
    assert records["FD (the image)"].count == 60
    assert records["FD (the image)"].settings["reference_count"] == 60
    with pytest.raises(UserError, match="overlap is more than 5 images and more than groups"):
        SampleQuality(overlap=10)


def test_samples_fewer_than_dimensions_are_noticed_once(generator):
    """As many as there are dimensions are too few, too."""
    train, samples = torch.rand(2, 12, 1, 3, 3, generator=generator)
    subject = subject_of(train, samples[:9], Pixels().load("cpu"))
    subject = subject._replace(samples={**subject.samples, "more": SampleSet(samples[:4], torch.ones(4).long(), {})})
    with pytest.warns(
        UserWarning, match=r"FD \(pixels\) in 9 dimensions .* 10 images or more.*some has 9, more has 4;"
    ):
        records = SampleQuality()(subject, generator)
    assert {r.name.split()[0] for r in records} == {"FD", "KID", "precision", "recall", "density", "coverage"}
    SampleQuality()(subject_of(train, samples[:10], Pixels().load("cpu")), generator)  # no warning


def test_a_judge_of_other_classes_says_nothing_of_intended_ones(generator):
    train, samples = torch.rand(2, 12, 1, 2, 2, generator=generator)
    subject = subject_of(train, samples, WHOLE, classes=("dark", "middling", "bright"))
    names = {r.name for r in SampleQuality()(subject, generator)}
    assert "class score (the image)" in names
    assert "intended class (the image)" not in names


def test_a_judge_of_more_classes_is_asked_by_name(generator):
    """It has the data's classes in another order and one more, which it assigns the darkest samples to."""
    train = torch.rand(12, 1, 2, 2, generator=generator)
    samples = torch.tensor([0.1, 0.1, 0.4, 0.4, 0.4, 0.6, 0.6, 0.6, 0.6, 0.6])[:, None, None, None].expand(-1, 1, 2, 2)
    by_mean = lambda f: torch.stack([f.mean(1) > 0.5, f.mean(1) < 0.2, (f.mean(1) - 0.35).abs() < 0.1], 1).float()
    judge = Features("judge", lambda x: x.flatten(1), by_mean, ("bright", "black", "dark"))
    subject = subject_of(train, samples.contiguous(), judge)
    (found,) = (r for r in SampleQuality(groups=5)(subject, generator) if r.name == "intended class (judge)")
    assert (found.value, found.series) == (0.8, {"dark": [pytest.approx(0.6)], "bright": [1.0]})
    asked_nothing = subject.samples["some"]._replace(y=torch.full((10,), -1))
    subject = subject._replace(samples={"some": asked_nothing})
    (found,) = (r for r in SampleQuality(groups=5)(subject, generator) if r.name == "intended class (judge)")
    assert (found.value, found.series) == (0.8, {})
    assert class_tables([vars(found)]) == []
    subject = subject._replace(features=judge._replace(classes=("bright", "black", "grey")))
    assert not any(r.name.startswith("intended") for r in SampleQuality(groups=5)(subject, generator))
    numbers = subject.data._replace(classes=("0", "2"))  # of another data set, whose classes have no names, either
    of_numbers = subject._replace(data=numbers, features=judge._replace(classes=("0", "1", "2")))
    assert not any(r.name.startswith("intended") for r in SampleQuality(groups=5)(of_numbers, generator))
    subject = subject._replace(features=WHOLE)  # any sample is in one of its two classes
    assert not any(r.name.startswith("intended") for r in SampleQuality(groups=5)(subject, generator))


class Small(nn.Module):
    """In the place of Inception."""

    def forward(self, x):
        assert len(x) <= 32
        return x.flatten(1)

    def logits(self, features):
        return torch.cat([bright(features), -bright(features)], 1)


def test_inception_gives_fid_and_is(generator, monkeypatch):
    monkeypatch.setattr(inception, "load", {"some.pth": Small()}.get)
    train, samples = torch.rand(2, 50, 1, 2, 2, generator=generator)
    space = find_space("inception:some.pth").load("cpu")
    with pytest.warns(UserWarning, match="FID is published from 10,000 images or more, .* some has 50;"):
        records = {r.name: r for r in SampleQuality()(subject_of(train, samples, space), generator)}
    ours = [f"{name} (inception)" for name in ("precision", "recall", "density", "coverage")]
    assert list(records) == ["FID", "KID", *ours, "IS"]
    plain = {r.name: r for r in SampleQuality()(subject_of(train, samples, WHOLE), generator)}
    assert records["FID"].value == plain["FD (the image)"].value
    assert records["KID"].value == plain["KID (the image)"].value


def test_features_of_a_model_in_training_leave_no_trace(net):
    model = advebm.wrap(nn.Sequential(nn.Flatten(1), nn.BatchNorm1d(12)), mean=[0.5], std=[0.5]).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    space, x = feature_space("own", model), torch.rand(5, 3, 2, 2)
    found = space.extract(x)
    torch.testing.assert_close(found[:1], space.extract(x[:1]))
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@few_samples
def test_runs_are_judged_and_compared_in_pixels(small_run, tmp_path):
    run = Run(Path(shutil.copytree(small_run.folder, tmp_path / "run")))
    draw_set(run, "cs-class", run.recipe.sampler, 2)
    names = [r.name for r in evaluate_run(run, features="pixels")]
    assert {"FD (pixels)", "KID (pixels)", "coverage (pixels)"} <= set(names)
    assert not any("class score" in name for name in names)
    assert {r["judge"] for r in run.records() if r["name"] == "FD (pixels)"} == {"pixels"}
    (found,) = compare.compare([run], threat=Attack(eps=0.1, steps=1), features="pixels").values()
    assert "FD (pixels)" in {r["name"] for r in found}
    own = evaluate_run(run)
    assert "class score (own features)" in {r.name for r in own}
    before = {k: v for k, v in ((r.name, r.value) for r in own) if "own features" in k}
    named = {r.name: r.value for r in evaluate_run(run, features=str(run.folder))}
    for name, value in before.items():
        assert named[name.replace("own features", "features of run")] == pytest.approx(value, rel=1e-6)


def test_python_names_spaces_too(small_run, generator):
    data = advebm.load_data("digits")
    samples = {"test": SampleSet(data.test.float(), data.test.y, {})}
    options = {"data": data, "threat": Attack(), "metrics": [SampleQuality()], "samples": samples}
    records = {r.name: r.value for r in advebm.evaluate(advebm.load(small_run.folder), **options, features="pixels")}
    assert records["coverage (pixels)"] > 0.6
    assert records["precision (pixels)"] > 0.6
