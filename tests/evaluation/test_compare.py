"""Runs side by side, whole experiments, and the inventory of the papers."""

import dataclasses
import json
import re
import shutil
import statistics
from pathlib import Path

import pytest
import torch

from advebm import cli, recipes
from advebm.attacks.projected import Attack, Targeted
from advebm.cli import options as cli_options
from advebm.cli import parser as cli_parser
from advebm.core import config
from advebm.core.errors import UserError
from advebm.data.ood_sets import UniformNoise
from advebm.data.sources import Classes, Digits, Part, find_spec
from advebm.evaluation import compare
from advebm.evaluation.suites import SUITES
from advebm.metrics.base import Subject
from advebm.metrics.energy import Energies
from advebm.metrics.keys import Key, attack_key, key_of
from advebm.metrics.ood import OutOfDistribution
from advebm.metrics.robustness import RobustAccuracy, TargetedAccuracy, measure_accuracy
from advebm.metrics.verdicts import find_verdicts
from advebm.models.precision import asked_precision
from advebm.objectives.at import AT
from advebm.objectives.awp import AWP
from advebm.objectives.free import FREE
from advebm.objectives.langevin import MLE, SGLD
from advebm.objectives.standard import Standard
from advebm.objectives.trades import TRADES
from advebm.papers import inventory
from advebm.reporting import figures
from advebm.reproduction import binary, experiments
from advebm.reproduction import study as studies
from advebm.reproduction.experiment import Experiment
from advebm.runs.optim import Cyclic
from advebm.runs.recipe import read, resolve
from advebm.runs.run import Run
from advebm.samplers.classifier import CS, RCS, TA, Langevin
from advebm.samplers.critic import Ascent
from advebm.sampling.step_curve import CurvePoint
from advebm.training.cost import passes_per_image
from advebm.training.loop import train
from advebm.workflows.sample import draw_set
from tests.helpers import few_samples, patch_experiments, tiny
from tests.references import attacks as reference


@pytest.fixture
def critic(tmp_path):
    options = {"backbone.width": 8, "train.images": 128, "train.validate_every": 1000, "outside": "noise"}
    return train(resolve(recipes.find("digits-binary-at"), list(options.items())), tmp_path / "critic", device="cpu")


@pytest.fixture
def run(small_run, tmp_path):
    return Run(Path(shutil.copytree(small_run.folder, tmp_path / "run")))


@pytest.mark.parametrize(
    ("objective", "forward", "backward"),
    [
        (Standard(), 1, 1),
        (AT(Attack(steps=7)), 8, 8),
        (TRADES(Attack(steps=10, start="gaussian")), 13, 12),  # target, 10 steps, clean and adversarial
        (FREE(replays=8), 8, 8),
        (AWP(AT(Attack(steps=2)), warmup=100), 4, 4),  # 2 steps, the direction, the loss
        (MLE(SGLD(steps=20, buffer=8)), 22, 22),
    ],
)
def test_passes_are_those_of_the_algorithm(objective, forward, backward):
    assert passes_per_image(dataclasses.replace(tiny("digits-standard"), objective=objective)) == (forward, backward)


def test_passes_of_a_growing_search_are_those_of_its_longest():
    options = [("objective.curriculum", {"steps": 5}), ("objective.r1", 0.0)]
    assert passes_per_image(resolve(recipes.find("digits-binary-at"), options)) == (7, 7)  # both sets in the loss


def test_a_comparison_measures_once(run, monkeypatch):
    threat = Attack(eps=0.3, norm="l2", steps=4)
    found = compare.compare([run], threat=threat)
    assert list(found) == ["digits-at"]
    values = {r["name"]: r["value"] for r in found["digits-at"]}
    names = {"accuracy", "accuracy under PGD-10 l2 0.3", "accuracy under PGD-50 l2 0.3"}
    assert values.keys() == {*names, "accuracy under energy attack-4 l2 0.3", *compare.COSTS}
    assert values["accuracy under PGD-50 l2 0.3"] <= values["accuracy"]
    assert (values["forward passes an image"], values["backward passes an image"]) == (3, 3)
    speeds = [line["perf/img_per_s"] for line in run.history() if "perf/img_per_s" in line]
    assert values["training images a second"] == statistics.median(speeds)
    before = run.records()
    monkeypatch.setattr(compare.evaluate, "evaluate_run", lambda *a, **k: pytest.fail("measured again"))
    assert compare.compare([run], threat=threat) == found
    assert run.records() == before


@few_samples
def test_what_has_changed_is_measured_again(run, tmp_path):
    """Another step of the same attack, other samples, another judge: none passes for what was measured before."""
    draw_set(run, "cs-class", run.recipe.sampler, 4)
    threat, names = Attack(eps=0.3, norm="l2", steps=4), ("accuracy under PGD-10 l2 0.3", "FD (features of run)")
    judge = shutil.copytree(run.folder, tmp_path / "judge" / "run")
    read = lambda **o: {
        r["name"]: r for r in compare.compare([run], **{"threat": threat, "features": judge, **o})["digits-at"]
    }
    first = read()
    tiny_steps = read(threat=dataclasses.replace(threat, step_size=1e-4))
    assert tiny_steps[names[0]]["value"] > first[names[0]]["value"]
    draw_set(run, "cs-class", dataclasses.replace(run.recipe.sampler, steps=1), 4)
    other = read()
    assert other[names[0]]["value"] == first[names[0]]["value"]
    assert other[names[1]]["value"] != first[names[1]]["value"]
    untrained = Run(Path(shutil.copytree(judge, tmp_path / "elsewhere" / "run")))
    (untrained.folder / "checkpoints" / "LATEST").write_text(untrained.checkpoints.names()[0])
    assert read(features=untrained.folder)[names[1]]["value"] != other[names[1]]["value"]


def test_runs_of_one_recipe_are_told_apart_by_folder(run, small_run):
    assert list(compare.by_title([run, small_run])) == [str(run.folder), str(small_run.folder)]


def test_seeds_give_mean_and_deviation():
    record = lambda value: {"name": "a", "value": value, "error": 9.0, "settings": {}}
    (merged,) = compare.over_seeds([{"x": [record(v)]} for v in (1.0, 2.0, 6.0)])["x"]
    assert (merged["value"], merged["seeds"]) == (3.0, 3)
    assert merged["error"] == pytest.approx(7**0.5)
    assert compare.over_seeds([{"x": [record(1.0)]}]) == {"x": [record(1.0)]}


def test_compare_on_the_command_line(run, tmp_path, capsys):
    out = tmp_path / "c.html"
    arguments = ["compare", run.folder, "--threat.steps", 2, "--out", out, "--device", "cpu"]
    assert cli.main([str(a) for a in arguments]) == 0
    printed = capsys.readouterr().out
    assert "PGD-50" in printed
    assert printed.strip().endswith(str(out))
    assert "Energy during training" in out.read_text()


def test_a_targeted_attack_goes_to_another_class(small_run):
    """Against a re-derivation that attacks towards the same drawn classes."""
    model, data = small_run.model()[0], Digits().load()
    split = data.test.take(slice(64))
    attack = Attack(eps=0.9, norm="l2", steps=5, start="clean")
    subject = Subject(model, data, split, attack)
    (run,) = Targeted(attack).runs(10)
    x = split.float()
    moved = run.search(model, x, split.y, torch.Generator().manual_seed(1))
    goal = (split.y + torch.randint(1, 10, (64,), generator=torch.Generator().manual_seed(1))) % 10
    assert (goal != split.y).all()
    expected = reference.pgd_l2(model, x, goal, 0.9, -0.45, 5)  # descends the cross-entropy of the goal
    torch.testing.assert_close(moved, expected, atol=1e-5, rtol=0)
    (record,) = TargetedAccuracy()(subject, torch.Generator().manual_seed(1))
    stands = find_verdicts(model, split.x, split.y, Targeted(attack), seed=3).standing().float().mean().item()
    assert record.value == pytest.approx(stands, abs=0.1)  # other goals
    untargeted = measure_accuracy(subject, attack, torch.Generator().manual_seed(1))[0]
    assert record.value > untargeted


def test_parts_of_a_source_are_disjoint_and_whole():
    whole, first, rest = (s.load() for s in (Digits(), Part(share=0.3), Part(share=0.3, rest=True)))
    assert len(first.train) + len(rest.train) == len(whole.train)
    assert (first.train.y.bincount() - 0.3 * whole.train.y.bincount()).abs().max() <= 1
    key = lambda images: {tuple(x.flatten().tolist()) for x in images.x}
    assert key(first.train) | key(rest.train) == key(whole.train)
    assert torch.equal(first.test.x, whole.test.x)
    with pytest.raises(UserError, match="share must lie in"):
        Part(share=1.0)


def test_classes_of_a_source_are_disjoint_and_whole():
    whole, some, rest = (s.load() for s in (Digits(), Classes(count=7), Classes(count=7, rest=True)))
    assert (len(some.classes), len(rest.classes)) == (7, 3)
    assert {*some.classes, *rest.classes} == {*whole.classes}
    assert (some.name, rest.name) == ("digits, 7 classes", "digits, 3 other classes")
    named = lambda data, split: {
        (x.numpy().tobytes(), data.classes[k]) for x, k in zip(split.x, split.y.tolist(), strict=True)
    }
    for name in ("train", "val", "test"):
        one, two, every = (named(data, getattr(data, name)) for data in (some, rest, whole))
        assert one | two == every
        assert not one & two
    with pytest.raises(UserError, match="digits has 10 classes, so take fewer, got 10"):
        Classes(count=10).load()
    with pytest.raises(UserError, match="at least 1 class"):
        Classes(count=0)


def test_classes_may_be_named():
    whole = Digits().load()
    options = [("data", "classes"), ("data.source", "digits"), ("data.names", "7,3")]
    source = resolve(recipes.find("digits-at"), options).data
    two, rest = source.load(), dataclasses.replace(source, rest=True).load()
    assert (two.name, two.classes) == ("digits, 3 and 7", ("3", "7"))
    assert torch.equal(two.train.x, whole.train.x[(whole.train.y == 3) | (whole.train.y == 7)])
    assert two.test.y.bincount().tolist() == [(whole.test.y == 3).sum(), (whole.test.y == 7).sum()]
    assert (rest.name, rest.classes) == ("digits, 8 other classes", tuple("01245689"))
    assert find_spec(source).classes == 2
    with pytest.raises(UserError, match="no class 'seven'; there is 0, 1"):
        Classes(names=("seven",)).load()
    with pytest.raises(UserError, match="leave count out"):
        Classes(names=("7",), count=1)


def test_recipes_may_stand_on_others(tmp_path):
    small, standard = recipes.find("cifar10-at-small"), recipes.find("cifar10-standard-small")
    assert standard["objective"] == {"kind": "standard"}
    assert standard["backbone"] == {**small["backbone"], "width": 32}
    assert standard["train"]["ema"] == small["train"]["ema"]
    assert "base" not in standard
    path = tmp_path / "mine.yaml"
    path.write_text("base: digits-at\nname: mine\ntrain: {images: 128}\n")
    recipe = resolve(read(path))
    assert (recipe.name, recipe.train.images, recipe.train.ema) == ("mine", 128, 3000)
    path.write_text("base: digits-att\nname: mine\n")
    with pytest.raises(UserError, match="did you mean 'digits-at'"):
        read(path)


def test_merging_keeps_options_of_the_same_kind_alone():
    old = {"a": {"kind": "x", "p": 1, "q": 2}, "b": 1}
    assert config.merge(old, {"a": {"q": 3}}) == {"a": {"kind": "x", "p": 1, "q": 3}, "b": 1}
    assert config.merge(old, {"a": {"kind": "x", "q": 3}})["a"] == {"kind": "x", "p": 1, "q": 3}
    assert config.merge(old, {"a": {"kind": "y"}, "b": 2}) == {"a": {"kind": "y"}, "b": 2}


# Experiments --------------------------------------------------------------------------------------------------------


def test_metrics_that_say_all_of_themselves_are_held_by_all_of_it(run, monkeypatch):
    """Detection of other sets, or under another attack, is measured again; the very same is not."""
    measured = []
    real = compare.evaluate.evaluate_run
    look = lambda run, recipe, **rest: measured.append(recipe.metrics) or real(run, recipe=recipe, **rest)
    monkeypatch.setattr(compare.evaluate, "evaluate_run", look)
    small = OutOfDistribution(sets=(UniformNoise(),), count=20, eps=0.0)
    for metric in (small, small, dataclasses.replace(small, count=30), dataclasses.replace(small, count=30)):
        compare.measure(run, {Key("AUROC", set="uniform", by="energy"): metric})
    assert [m[0].count for m in measured] == [20, 30]


def test_energies_of_samples_are_held(run):
    """They say nothing of how the samples were drawn, and are not measured again for that."""
    draw_set(run, "cs-class", run.recipe.sampler, 2)
    wanted = {Key("E(x)", set="test images"): Energies(), Key("E(x)", samples="cs-class"): Energies()}
    for _ in range(2):
        assert [key_of(r) for r in compare.measure(run, wanted)] == list(wanted)
    assert len(run.records()) == 3


def test_records_of_other_names_are_all_kept(run):
    attack = {"attack": config.describe(Attack())}
    about = {"value": 1.0, "error": 0.0, "count": 1, "series": {}, "settings": attack}
    records = [{**about, "name": f"margin, {how} under {Attack().name}"} for how in ("mean", "max")]
    assert compare.evaluate.newest_records(records) == records
    merged = compare.over_seeds([{"x": records}, {"x": records}])["x"]
    assert [r["name"] for r in merged] == [r["name"] for r in records]


def test_an_attack_on_other_images_is_measured_again(run):
    for images in (10, 10, 20):
        attack = RobustAccuracy(Attack(eps=0.5, norm="l2", steps=1), images=images)
        compare.measure(run, {Key("accuracy", attack_key(attack.attack)): attack})
    assert [r["count"] for r in run.records()] == [10, 20]
    for precision in ("bfloat16", "float32", "bfloat16"):
        again = dataclasses.replace(attack, precision=precision)
        found = compare.measure(run, {Key("accuracy", attack_key(attack.attack)): again})
        assert [asked_precision(r["settings"]["precision"]) for r in found] == [precision]
    assert [r["count"] for r in run.records()] == [10, 20, 20]


@few_samples
def test_an_experiment_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    """Two methods, two seeds; a second call trains, draws and measures nothing; another recipe is refused."""

    def small(folder, options):
        short = {"backbone__width": 8, "train__images": 512, "train__validate_every": 512, "threat__steps": 2}
        entries = {name: studies.find_recipe(f"digits-{name}", options, **short) for name in ("standard", "noise")}
        measure = lambda runs: studies.compare_all(runs, "standard", entries["standard"].threat)
        return Experiment(entries, measure, per_class=4)

    monkeypatch.setitem(experiments.EXPERIMENTS, "small", small)
    page = experiments.reproduce("small", tmp_path / "out", seeds=2, options=[("sampler.steps", 2)])
    assert page.exists()
    first = json.loads((tmp_path / "out" / "results.json").read_text())
    assert first.keys() == {"standard", "noise"}
    assert all(record["seeds"] == 2 for records in first.values() for record in records)
    assert any(record["name"] == "FD (features of standard)" for record in first["noise"])
    for name in ("fit", "draw_set"):
        patch_experiments(monkeypatch, name, lambda *a, **k: pytest.fail("done again"))
    monkeypatch.setattr(compare.evaluate, "evaluate_run", lambda *a, **k: pytest.fail("measured again"))
    experiments.reproduce("small", tmp_path / "out", seeds=2, options=[("sampler.steps", 2)])
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == first
    with pytest.raises(UserError, match="holds a run of another recipe"):
        experiments.reproduce("small", tmp_path / "out", options=[("sampler.steps", 2), ("optimizer.lr", 0.5)])


def test_bad_experiments_are_refused(tmp_path, capsys):
    with pytest.raises(UserError, match=r"no experiment 'jeat-figur5' .did you mean 'jeat-figure5'"):
        experiments.reproduce("jeat-figur5", tmp_path)
    with pytest.raises(UserError, match="jeat-table1 is a table; say how large with --scale, one of full"):
        experiments.reproduce("jeat-table1", tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").touch()
    with pytest.raises(UserError, match="is a run; --out takes a folder for the whole experiment"):
        experiments.reproduce("jeat-figure5", run)
    shutil.rmtree(run)
    with pytest.raises(UserError, match="seeds must be at least 1"):
        experiments.reproduce("jeat-figure5", tmp_path, seeds=0)
    with pytest.raises(
        UserError,
        match="jeat-figure5 has no quick form; binary-at-stability, digits-binary-at, ",
    ):
        experiments.reproduce("jeat-figure5", tmp_path, quick=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", experiments.QUICK)
def test_the_quick_form_is_shorter_and_says_so(name, tmp_path, monkeypatch):
    lengths, titles = {}, []

    def look(experiment, folder, seeds, given):
        lengths[folder.name] = {t: entry.train.images for t, entry in experiment.recipes.items() if "@" not in t}
        return {"a": []}, ["run"]

    patch_experiments(monkeypatch, "carry_out", look)
    make, plain = experiments.EXPERIMENTS[name], {"figures": lambda results: {}, "conclude": lambda results: []}
    without = lambda folder, options: dataclasses.replace(make(folder, options), **plain)
    monkeypatch.setitem(experiments.EXPERIMENTS, name, without)
    monkeypatch.setattr(experiments, "report", lambda *runs, title, **rest: titles.append(title))
    for quick in (False, True):
        (tmp_path / str(quick)).mkdir()
        experiments.reproduce(name, tmp_path / str(quick), quick=quick)
    assert lengths["True"].keys() == lengths["False"].keys()
    assert all(lengths["True"][title] <= lengths["False"][title] / 2 for title in lengths["True"])
    assert titles[0] == name
    assert titles[1].startswith(f"{name} --quick")


def test_every_sampler_is_tuned_over_the_same_grid(critic, monkeypatch):
    """By FD in the table's features; the best of all, and the best at the common number of steps."""
    asked = []

    def search(run, grid, *, features, by, per_class, device, backend):
        assert backend == "auto", "the recipe is of float32"
        asked.append((features, by, per_class, device))
        worth = lambda s: abs(s.steps - 32) + abs(s.step_size - 0.2) + s.noise + (s.radius or 0.5)
        trials = [{"sampler": config.describe(s), "value": worth(s)} for s in grid]
        asked.append({(s.step_size, s.noise, s.radius, s.steps) for s in grid})
        return sorted(trials, key=lambda trial: trial["value"]), None

    monkeypatch.setattr(studies, "search_settings", search)
    found = studies.tune(critic, Ascent(step_size=0.1), "inception", 100)
    assert asked[0] == ("inception", "FD", 10, "cpu")
    grids = [asked[1]]
    for kind in (TA, CS, RCS):
        studies.tune(critic, kind(step_size=0.1), "inception")
        grids.append(asked[-1])
    assert all(grid == grids[0] for grid in grids)
    assert len(grids[0]) == 3 * 2 * 2 * 4
    assert (found["best"].steps, found["best"].step_size, found["best"].radius) == (32, 0.2, None)
    assert (found["common"].steps, found["common"].step_size) == (16, 0.2)
    studies.tune(critic, Langevin(step_size=0.1, noise=0.03), "inception")
    assert {noise for _, noise, _, _ in asked[-1]} == {0.0, 0.01, 0.03}, "and its own noise"


def test_a_set_is_drawn_again_only_with_other_settings(critic, monkeypatch):
    few = dataclasses.replace(critic.recipe, sampler=Ascent(steps=1, start="noise"))
    drawn = []
    monkeypatch.setattr(studies, "draw_set", lambda *a, **k: drawn.append(a[2].steps) or draw_set(*a, **k))
    for steps in (1, 1, 2, 2):
        other = dataclasses.replace(few, sampler=dataclasses.replace(few.sampler, steps=steps))
        assert studies.draw_if_missing(critic, other, 1, "set") == "set"
    assert drawn == [1, 2]
    studies.draw_if_missing(critic, dataclasses.replace(few, seed=7), 1, "set")
    assert drawn == [1, 2, 1]


def test_efficiency_is_the_cost_of_equally_good_samples(monkeypatch):
    fds = {"binary-at": (9.0, 5.0, 2.0), "jem": (8.0, 6.0, 4.0), "short-run-mle": (9.0, 7.0, 3.5)}
    samplers = {}

    def along(run, recipe, judge):
        samplers[run] = recipe
        return [CurvePoint(k, fd, 0.0, k / 100) for k, fd in zip((1, 4, 8), fds[run], strict=True)]

    class Named(str):
        recipe = resolve(recipes.find("digits-jem"))

    patch_experiments(monkeypatch, "measure_steps", along)
    found = binary.efficiency({t: Named(t) for t in fds}, "judge", {t: [] for t in fds})
    values = {t: {r["name"]: r["value"] for r in records} for t, records in found.items()}
    assert values["jem"] == {"gradients an image to equal FD": 8, "milliseconds an image to equal FD": 80}
    assert values["binary-at"]["gradients an image to equal FD"] == 8
    assert values["short-run-mle"]["gradients an image to equal FD"] == 8
    fds["binary-at"] = (9.0, 4.0, 2.0)
    found = binary.efficiency({t: Named(t) for t in fds}, "judge", {t: [] for t in fds})
    assert found["binary-at"][0]["value"] == 4
    assert samplers["jem"].sampler.start == "noise"


def test_figures_of_binary_at(monkeypatch):
    """Fixed K, what belongs to one run's course, and the p0s, each in its own figure."""
    fd = lambda value: [{"name": "FD (x)", "value": value, "error": 0.1, "settings": {"space": "x"}}]
    results = {"k-grows": fd(3.0), "k-5": fd(5.0), "k-25": fd(4.0), "k-grows@100": fd(9.0), "k-grows@200": fd(6.0)}
    results |= {"k-25@100": fd(8.0), "k-25@200": fd(7.0), "no-r1": fd(11.0), "p0-noise": fd(2.0)}
    drawn = []
    for name in ("lines", "bars"):
        monkeypatch.setattr(figures, name, lambda values, *words, **rest: drawn.append(values) or b"")
    assert len(binary.binary_at_figures(results)) == 3
    assert drawn[0] == {"": {5.0: (5.0, 0.1), 25.0: (4.0, 0.1)}}
    assert drawn[1]["k-grows"] == {100.0: (9.0, 0.1), 200.0: (6.0, 0.1), 400.0: (3.0, 0.1)}
    assert drawn[1].keys() == {"k-grows", "k-25"}
    assert drawn[2] == {"patches": (3.0, 0.1), "noise": (2.0, 0.1)}


@pytest.mark.parametrize("name", experiments.EXPERIMENTS)
def test_every_experiment_is_made_of_recipes_that_resolve(name, tmp_path):
    """All but the training: entries and options fit together."""
    seen = experiments.EXPERIMENTS[name](tmp_path, [("train.images", 1234)]).recipes
    assert len(seen) >= 2
    shorter = {title: 1234 if "@" not in title else int(title.partition("@")[2]) for title in seen}
    assert all(recipe.train.images == shorter[title] <= 1234 for title, recipe in seen.items())
    assert len({recipe.threat for recipe in seen.values()}) == 1
    assert not list(tmp_path.iterdir()), "nothing is trained before it is carried out"


# The inventory ------------------------------------------------------------------------------------------------------

PAPERS = {paper["key"]: paper for paper in inventory.papers()}
COUNTS = {  # what the documents number, and how far
    "cem-workshop": {"figure": 1, "table": 2},
    "cem-slides": {},
    "jeat": {"figure": 13, "table": 4, "algorithm": 2},
    "binary-at": {"figure": 7, "table": 4, "algorithm": 2},
}


@pytest.mark.parametrize("key", COUNTS)
def test_every_figure_table_and_algorithm_is_listed(key):
    ids = [item["id"] for item in PAPERS[key]["items"]]
    assert len(set(ids)) == len(ids)
    for kind, count in COUNTS[key].items():
        numbered = sorted(int(i.rpartition("-")[2]) for i in ids if i.startswith(f"{kind}-") and i[-1].isdigit())
        assert numbered == list(range(1, count + 1)), kind


def commands():
    for paper in PAPERS.values():
        for item in paper["items"]:
            yield f"{paper['key']} {item['id']}", item["status"], item["how"]
            for row in item.get("rows", []):
                yield f"{paper['key']} {item['id']} {row['name']}", row["status"], row.get("how", "")


@pytest.fixture(scope="module")
def parser():
    return cli_parser.build_parser()


@pytest.mark.parametrize(("where", "status", "how"), list(commands()))
def test_every_item_has_a_command_that_is_there_or_a_reason(where, status, how, parser):
    assert status in {"runnable", "quoted", "not-run", "doubtful"}
    if status == "runnable":
        assert how.startswith("advebm ")
    for command in how.split("&&") if how.startswith("advebm ") else ():
        plain, overrides = cli_options.split_overrides(command.split()[1:])
        args, unexpected = parser.parse_known_args(plain)
        cli_options.check_options(args, unexpected, overrides)
        if getattr(args, "recipe", None):
            resolve(recipes.find(args.recipe), overrides)
        if getattr(args, "method", None):
            config.build({"kind": args.method, **{k.partition(".")[2]: v for k, v in overrides}}, "sampler")
        assert getattr(args, "experiment", None) in (None, *experiments.EXPERIMENTS, *inventory.tables()), where
        assert getattr(args, "suite", None) in (None, *SUITES), where


def test_every_row_that_can_be_run_names_what_trains_it():
    for where, status, how in commands():
        if len(where.split()) > 2 and status == "runnable":
            assert "--recipe" in how or " reproduce " in how, where


def test_the_list_of_the_papers_is_printed(capsys):
    assert cli.main(["reproduce", "--list"]) == 0
    out = capsys.readouterr().out
    assert "digits-supervised" in out
    assert "jeat: Towards Understanding" in out


# The full recipes -----------------------------------------------------------------------------------------------------

TABLE4 = {  # JEAT table 4: rate, batch, where it falls (epochs), epochs, weight decay
    "jeat": (1e-4, 64, (160, 180), 200, 0.0),
    "jem": (1e-4, 64, (160, 180), 200, 0.0),
    "free": (0.1, 128, (100, 150), 200, 2e-4),
    "fast": (0.2, 128, None, 15, 5e-4),
    "trades": (0.1, 128, (75, 90, 100), 120, 2e-4),
}


@pytest.mark.parametrize("data", ["cifar10", "cifar100"])
@pytest.mark.parametrize("method", TABLE4)
def test_the_full_recipes_are_those_of_the_papers_table(method, data):
    lr, batch, falls, epochs, decay = TABLE4[method]
    recipe = resolve(recipes.find(f"{data}-{method}"))
    assert (recipe.optimizer.lr, recipe.train.batch, recipe.optimizer.weight_decay) == (lr, batch, decay)
    assert recipe.train.images * recipe.objective.replays == epochs * 50_000
    if falls:
        assert recipe.schedule.at == pytest.approx([fall / epochs for fall in falls])
        assert recipe.schedule.factor == (0.3 if method == "jem" else 0.1)  # JEM's own code
    else:
        assert recipe.schedule == Cyclic(0.5)
    if method in ("jeat", "jem"):
        assert recipe.optimizer.betas == (0.9, 0.999)
    else:
        assert recipe.optimizer.momentum == 0.9
    assert (recipe.backbone.depth, recipe.backbone.widen) == (28, 10)
    assert (recipe.threat.eps, recipe.threat.steps, recipe.threat.step_size) == (8 / 255, 50, 2 / 255)


METHODS = {
    name.removeprefix("cifar10-")
    for name in recipes.names()
    if name.startswith("cifar10-")
    and "binary" not in name  # whose outside images are CIFAR-100
    and not any(method in name for method in ("acl", "infonce"))  # CEM's, on CIFAR-10 alone
    and "-l2" not in name
    and not name.endswith(("-resnet50", "-t50"))  # rows of a paper with another network, or steps
    and not re.search(r"-\d+(min|h)$", name)  # ours of a budget
    and "speedrun" not in name
}


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ("at-2h", "dat-2h"),
        ("at-5min", "binary-at-20min"),
        ("at-5min", "dat-10min"),
        ("at-20min", "jem-30min"),
        ("at-linf-20min", "jeat-30min"),
    ],
)
def test_the_first_stage_is_the_recipe_that_it_names(first, then):
    alone, stage = (resolve(recipes.find(f"cifar10-{name}")) for name in (first, then))
    stage = dataclasses.replace(stage.before[0], metrics=alone.metrics, sampler=alone.sampler)
    assert stage == alone


def test_every_method_has_a_recipe_for_every_size():
    full = {name for name in METHODS if not name.endswith("-small")}
    assert {"trades", "fast", "free", "at-awp", "trades-awp", "rst-awp", "jem", "prejeat", "jeat", "weat"} < full
    assert {"at", "standard", "noise", "short-run-mle", "persistent-mle", "oe", "ratio", "gat", "dat"} < full
    names = set(recipes.names())
    for method in full:
        assert {f"cifar100-{method}", f"cifar10-{method}-small", f"cifar100-{method}-small"} <= names
        assert method in ("at", "standard") or f"digits-{method}" in names
    for method in METHODS:
        ten, hundred = (resolve(recipes.find(f"{data}-{method}")) for data in ("cifar10", "cifar100"))
        if method != "standard-small":  # shorter, as a victim only
            assert hundred.train == ten.train
        assert hundred.objective == ten.objective
