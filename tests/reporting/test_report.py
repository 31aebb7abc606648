"""The report's first screen, the records behind it, and the demo's conclusion."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from matplotlib import pyplot as plt

from advebm.attacks.projected import Attack
from advebm.core import config
from advebm.data.sources import Images
from advebm.evaluation import evaluate
from advebm.metrics.quality import SampleQuality
from advebm.metrics.texts import caution, short_text
from advebm.reporting import figures, overview
from advebm.reporting.build import report
from advebm.reporting.records import best_set, find_accuracies, rate_sets
from advebm.reporting.terminal import print_accuracies, print_sets
from advebm.runs.run import Run
from advebm.workflows import demo
from advebm.workflows.sample import draw_set
from tests.helpers import few_samples

THREAT = Attack(eps=0.9, norm="l2", steps=20)


def record(name, value, error=0.01, count=400, **settings):
    return {"name": name, "value": value, "error": error, "count": count, "settings": settings, "series": {}}


def attacked(value, steps=20, eps=0.9, norm="l2", **settings):
    attack = config.describe(Attack(eps=eps, norm=norm, steps=steps))
    return record(f"accuracy under PGD-{steps} {norm} {eps:g}", value, attack=attack, **settings)


def quality(name, fd, recall=0.5, **settings):
    about = {"samples": name, "space": "judge", "few": False, **settings}
    return [record("FD (judge)", fd, **about), record("recall (judge)", recall, **about)]


@pytest.fixture
def run(small_run, tmp_path):
    return Run(Path(shutil.copytree(small_run.folder, tmp_path / "mine")))


def write_records(run, *records):
    (run.folder / "metrics.json").write_text(json.dumps(records))


def test_the_best_set_is_judged_by_another_network_and_large():
    records = [*quality("far", 9.0, 0.9), *quality("near", 5.0, 0.1), *quality("own", 1.0, 1.0, own_features=True)]
    records += quality("few", 2.0, 0.2, few=True)
    sets = rate_sets({"run": records})["judge"]
    assert [s.name for s in sets] == ["far", "near", "own", "few"]
    assert best_set(sets).name == "near"
    assert best_set(sets, "recall").name == "far"
    assert best_set([s for s in sets if s.judges_itself]) is None
    assert caution(records[4]) == "in the model's own features"
    assert not caution(records[0])


def test_accuracies_are_of_the_threat_and_the_strongest_attack():
    others = [attacked(0.1, eps=0.45), attacked(0.1, norm="linf"), attacked(0.1, targeted=True)]
    probe = record("accuracy of a linear probe", 0.2)
    clean, lowest = find_accuracies([record("accuracy", 0.9), attacked(0.5), attacked(0.4, 50), *others, probe], THREAT)
    assert (clean["value"], lowest["value"]) == (0.9, 0.4)
    assert find_accuracies([probe], THREAT) == (None, None)
    assert find_accuracies([probe], THREAT, "a linear probe") == (probe, None)


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (record("FD (x)", 29.524, 0.737), "29.5 ± 0.7"),
        (record("KID (x)", 0.02571, 0.0009), "0.0257 ± 0.0009"),
        (record("FD (x)", 173.3, 14.4), "173 ± 14"),
        (record("accuracy", 0.5378, 0.026), "53.8 ± 2.6 %"),
    ],
)
def test_as_many_digits_as_the_error_allows(made, text):
    assert short_text(made) == text


@few_samples
def test_a_model_that_judges_itself_under_its_name_is_marked(run, tmp_path):
    draw_set(run, "s", run.recipe.sampler, 1)
    judge = Run(Path(shutil.copytree(run.folder, tmp_path / "judge")))
    recipe = evaluate.dataclasses.replace(run.recipe, metrics=(SampleQuality(),))
    own, other = (evaluate.evaluate_run(run, recipe=recipe, features=r.folder) for r in (run, judge))
    assert [r.settings.get("own_features") for r in own + other] == [True] * len(own) + [None] * len(other)
    assert run.records()[0]["settings"]["own_features"]


def test_the_demo_concludes_what_its_numbers_say():
    def conclude(was, now, far, near):
        records = {
            demo.STANDARD: [attacked(was), *quality("cs", far, own_features=True), *quality("ta", 3.0)],
            demo.ROBUST: [attacked(now), *quality("cs", near), *quality("ta", near + 50)],
        }
        return demo.conclude(records, THREAT)

    text = conclude(0.06, 0.54, 100.0, 29.5)
    assert "keeps 54 % accuracy under attack instead of 6 %" in text
    assert "samples are nearer to real digits: FD 29.5 against 100* by the same search, cs." in text
    text = conclude(0.54, 0.06, 29.5, 100.0)
    assert "is less robust: 6 % accuracy under attack against 54 %" in text
    assert "farther from real digits: FD 100 against 29.5*" in text
    text = conclude(0.540, 0.545, 29.5, 29.51)
    assert "no more robust" in text
    assert "as far from real digits" in text
    assert demo.conclude({demo.STANDARD: [], demo.ROBUST: []}, THREAT).endswith("network was not measured.")


def test_tables_of_the_demo(capsys):
    runs = {
        "plain": [record("accuracy", 0.98), attacked(0.06), *quality("cs", 1.0, 0.9, own_features=True)],
        "robust": [record("accuracy", 0.99), attacked(0.54), *quality("cs", 30.0), *quality("ta", 40.0, 0.7)],
    }
    print_accuracies(runs, THREAT)
    print_sets(runs, ("FD", "recall"))
    out = capsys.readouterr().out
    assert re.search(r"clean +attacked \(PGD-20 l2 0\.9\)", out)
    assert re.search(r"robust +99\.0 ± 1\.0 % +54\.0 ± 1\.0 %", out)
    assert re.search(r"cs +plain \* +1\.00 ± 0\.01 +0\.90 ± 0\.01 *$", out, re.M)
    assert re.search(r"cs +robust +30\.00 ± 0\.01 best +0\.50 ± 0\.01 *$", out, re.M)
    assert re.search(r"ta +robust +40\.00 ± 0\.01 +0\.70 ± 0\.01 best *$", out, re.M)
    assert "* judged by the network that they were drawn from" in out


# The report -----------------------------------------------------------------------------------------------------------


def read_sentence(page):
    return re.search(r'<p class="sentence">(.*?)</p>', page, re.S)[1]


@few_samples
def test_the_first_screen(run):
    draw_set(run, "a", run.recipe.sampler, 2)
    draw_set(run, "b", run.recipe.sampler, 2)
    write_records(run, record("accuracy", 0.75), attacked(0.5, 3), attacked(0.6, 3, 0.5), *quality("a", 9.0, 0.9))
    run.append(quality("b", 5.0, 0.2))
    page = report(run).read_text()
    assert "<h1>mine on digits</h1>" in page
    sentence = read_sentence(page)
    assert "Classifies 75.0 % of 400 test images correctly, 50.0 % under attack (PGD-3 l2 0.9)." in sentence
    assert "Best samples, b: distance to real images FD 5.00 ± 0.01 (judge)." in sentence
    shown, folded = page.split("<details>", 1)
    assert re.findall(r'<figure class="panel"><h2>(.*?)</h2>', shown) == ["Real images", "b"]
    assert '<figure class="panel"><h2>a</h2>' in folded
    assert '<span title="7">7</span>' in shown
    assert shown.index('class="sentence"') < shown.index("Real images") < shown.index("accuracy against the radius")
    assert "<b>5</b>" in shown
    assert "<b>0.9</b>" in shown
    assert "<b>9</b>" not in shown
    assert "Configuration" in folded


def test_warnings_come_first(run):
    (run.folder / "metrics.json").write_text(json.dumps([attacked(0.5, eps=0.5)]))
    run.log({"event": "rollback", "images": 5, "reason": "the loss was not finite", "rate": 0.5})
    page = report(run).read_text()
    assert "Rollback at 5 images: the loss was not finite (learning rate x 0.5)." in page
    assert page.index("Rollback at") < page.index("not the threat that the model") < page.index("<h1>")
    assert "Training is not complete" not in page
    (run.folder / "config.yaml").write_text(
        (run.folder / "config.yaml").read_text().replace("images: 6000", "images: 9000")
    )
    assert "Training is not complete: 6,016 of 9,000 images" in report(Run.open(run.folder)).read_text()


def test_what_is_said_of_other_models(run, monkeypatch):
    describe = lambda *records: overview.describe({"x": run}, {"x": records})
    text = describe(record("accuracy of a linear probe", 0.5))
    assert text == "With a linear probe on its features, classifies 50.0 % of 400 test images correctly."
    about = {"outliers": "noise", "score": "energy"}
    clean, under = (record("AUROC vs noise", v, **about) for v in (0.98, 0.7))
    under["settings"]["attack"] = "APGD-10 l2 0.9"
    under["name"] += ", APGD-10 l2 0.9"
    other = record("AUROC vs grey", 0.9, outliers="grey", score="energy")
    assert describe(clean, under) == (
        "Tells test images from noise with an AUROC of 0.980, 0.700 where those are attacked."
    )
    assert describe(clean, other) == "Tells test images from 2 sets of other images with an AUROC of 0.900 to 0.980."
    assert re.match(r"Not evaluated yet \(advebm evaluate .*mine\); [\d.]+ % of the validation images", describe())
    monkeypatch.setattr(Run, "history", lambda self: [])
    assert describe() == f"Not evaluated yet (advebm evaluate {run.folder})."
    both = overview.describe({"x": run, "y": run}, {"x": [record("accuracy", 0.5)], "y": [record("accuracy", 0.25)]})
    assert both == "x: classifies 50.0 % of 400 test images correctly; y: 25.0 %."


@few_samples
def test_what_is_said_of_samples_whose_distance_says_little(run):
    draw_set(run, "s", run.recipe.sampler, 1)
    describe = lambda *records: overview.describe({"x": run}, {"x": [record("accuracy", 0.5), *records]})
    assert describe().endswith("Samples, s: not measured yet.")
    assert describe(*quality("s", 1.0, own_features=True)).endswith("FD says little (in the model's own features).")
    assert describe(*quality("s", 1.0, few=True)).endswith("FD says little (no more images than dimensions).")


@few_samples
def test_beside_a_run_stand_the_same_samples_and_a_comparison_first(run, small_run, tmp_path):
    other = Run(Path(shutil.copytree(small_run.folder, tmp_path / "other")))
    for r, names in ((run, "ab"), (other, "ab")):
        for name in names:
            draw_set(r, name, r.recipe.sampler, 1)
    write_records(run, *quality("b", 5.0), *quality("a", 9.0))
    compared = {"one": [record("accuracy", 0.5), *quality("b", 5.0)], "two": [record("accuracy", 0.25)]}
    page = report(run, beside=[other], compared=compared, out=tmp_path / "r.html").read_text()
    assert "<h1>mine beside other on digits</h1>" in page
    shown = page.split("<details>", 1)[0]
    titles = re.findall(r'<figure class="panel"><h2>(.*?)</h2>', shown)
    assert [title.rpartition(" · ")[2] for title in titles] == ["Real images", "b", "b"]
    table = shown[shown.index('class="side"') : shown.index('class="panels')]
    assert re.search(r"<td>accuracy</td><td[^>]*>50.0 ± 1.0 %</td><td[^>]*>25.0 ± 1.0 %</td>", table)
    assert "FD" not in table
    many = report(run, compared=dict.fromkeys("abcd", compared["one"]), out=tmp_path / "m.html").read_text()
    assert "<th>run</th><th>accuracy</th>" in many


def test_many_classes_large_pictures_and_no_training_images(run):
    data, few = run.data, torch.arange(40)
    big = Images(torch.zeros(40, 3, 200, 100, dtype=torch.uint8), few)
    names = tuple(f"class {k}" for k in range(40))
    none = Images(big.x[:0], big.y[:0])
    run.data = data._replace(classes=names, train=none, val=none, test=big)
    page = report(run).read_text()
    assert page.count('<span title="class') == 10
    assert "Real images" in page
    assert len(page) < 300_000
    run.data = run.data._replace(test=Images(big.x, torch.full((40,), -1)))
    assert '<span title="class' not in report(run).read_text()


def test_the_curve_begins_at_a_radius_of_zero_with_ticks_in_255ths(monkeypatch):
    drawn, threat = [], config.describe(Attack(eps=8 / 255, norm="linf", steps=20))
    monkeypatch.setattr(figures, "png", lambda figure: drawn.append(figure) or b"")
    figures.robustness({"x": [record("accuracy", 0.9), *(attacked(0.4, 20, k / 255, "linf") for k in (8, 16))]}, threat)
    (axis,) = drawn[0].axes
    drawn[0].canvas.draw()
    assert axis.get_xlim()[0] == 0
    assert [tick.get_text() for tick in axis.get_xticklabels()][1:5] == ["0", "4", "8", "12"]
    assert [text.get_position()[0] for text in axis.texts] == [8 / 255]
    plt.close("all")


def test_ticks_are_plain_numbers():
    history = [{"images": n, "train/loss": 10.0 ** (n - 3), "train/energy_joint": -3e5 * n} for n in range(1, 7)]
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "png", lambda figure: drawn.append(figure) or b"")
        assert figures.curves(history) == b""
        histogram = record("E(x) of a", 0.0)
        histogram["series"] = {"edges": [0.0, 1.0, 3.0], "density": [0.5, 0.25]}
        assert figures.energies([histogram, histogram]) == b""
    loss, energy = drawn[0].axes
    drawn[0].canvas.draw()
    texts = [tick.get_text() for axis in (loss, energy) for tick in axis.get_yticklabels() if tick.get_text()]
    assert "0.1" in texts
    assert all(re.fullmatch(r"[−-]?[\d.]+", text) for text in texts)
    assert not energy.yaxis.get_offset_text().get_text()
    one, two = drawn[1].axes
    assert one.get_xlim() == two.get_xlim()
    assert two.patches[1].get_data().values.tolist() == [1.0, 0.5]
    plt.close("all")
    assert figures.curves([]) is None
    falling = [{"images": n, "train/loss": -float(n)} for n in range(1, 4)]
    assert figures.curves(falling)  # a loss below zero has no logarithm
