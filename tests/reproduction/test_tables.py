"""The papers' tables beside ours: what stands where, verdicts, scales, and the page that is made of them."""

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from advebm import cli, recipes
from advebm.attacks.autoattack import AutoAttack
from advebm.attacks.cw import CW
from advebm.attacks.projected import Attack
from advebm.core import config, files
from advebm.core.errors import UserError
from advebm.data.sources import Digits, Part
from advebm.evaluation import compare
from advebm.papers import agreement as paper_verdicts
from advebm.papers import inventory, render
from advebm.papers.agreement import FAILS, HOLDS, NONE, UNRESOLVED
from advebm.papers.inventory import Table
from advebm.reporting import figures
from advebm.reproduction import binary, experiments, supervised, tables, unsupervised
from advebm.reproduction import page as results_page
from advebm.reproduction import study as studies
from advebm.reproduction.experiment import Experiment, carry_out
from advebm.reproduction.scales import SCALES, Scale
from advebm.runs.recipe import dump
from advebm.runs.run import Run
from advebm.sampling import generate
from tests.helpers import few_samples, patch_experiments, tiny

ROOT = Path(__file__).parents[2]
TABLES = inventory.tables()
LARGE = {"acl-resnet50", "dat-t50", "ratio-resnet50"}  # the papers' size alone
LACKING = {"full": set(), "cpu-2h": LARGE | {"acl", "ratio", "jem"}}  # methods that have no recipe at a scale


def record(name, value, error=0.01, count=100, **settings):
    return {"name": name, "value": value, "error": error, "count": count, "settings": settings}


def table(**changes):
    """Two methods, of which A is to be the more robust, and the less accurate."""
    rows = (
        {"name": "A", "values": {"clean": 84.0, "aa": 50.0, "aa_sd": 1.0}, "status": "runnable"},
        {"name": "B", "values": {"clean": 90.0, "aa": 20.0}, "status": "runnable"},
    )
    about = {"paper": "p", "item": "table-1", "what": "Two.", "name": "two", "by": "methods", "digits": "tiny"}
    columns, ours = {"clean": "", "aa": ""}, {"A": "at", "B": "noise"}
    claims = ("aa: A > B", "clean: B > A")
    about |= {"rows": rows, "scales": {"digits": 0}, "columns": columns, "ours": ours, "claims": claims}
    return Table(**{**about, **changes})


def numbers(**values):
    """Cells by row, of ``A=(clean, aa)``; with an error of 1."""
    cell = lambda value: {"value": value, "error": 1.0, "n": 100, "seeds": 1, "measured": "m"}
    return {row: dict(zip(("clean", "aa"), map(cell, of), strict=True)) for row, of in values.items()}


# Verdicts over seeds, and of what is missing -------------------------------------------------------------------------


def test_a_mean_over_seeds_is_surer_than_its_deviation():
    """54 against 51, each with a deviation of 2: unresolved with one seed, apart where they are means of nine."""
    found = numbers(A=(51.0, 50.0), B=(54.0, 20.0))
    for cells in found.values():
        cells["clean"]["error"] = 2.0
    assert paper_verdicts.judge_claims(table(), found)[1]["verdict"] == UNRESOLVED
    for cells in found.values():
        cells["clean"]["seeds"] = 9
    judgement = paper_verdicts.judge_claims(table(), found)[1]
    assert judgement["verdict"] == HOLDS
    assert judgement["error"] == pytest.approx((2 * (2 / 3) ** 2) ** 0.5)
    found["B"]["aa"] |= {"error": 2.0, "seeds": 9}
    row = table().row("B")
    assert paper_verdicts.is_close(row, "aa", {**found["B"]["aa"], "value": 23.5, "seeds": 1})
    assert not paper_verdicts.is_close(row, "aa", {**found["B"]["aa"], "value": 23.5})


def test_what_is_not_measured_is_not_reproduced():
    whole, part = numbers(A=(84.0, 50.0), B=(90.0, 20.0)), numbers(A=(84.0, 50.0))
    claims = paper_verdicts.judge_claims(table(), whole)
    assert paper_verdicts.table_verdict(table(), "full", whole, claims) == "reproduced"
    claims = paper_verdicts.judge_claims(table(), part)
    assert paper_verdicts.table_verdict(table(), "full", part, claims) == NONE
    del whole["B"]["clean"]
    claims = paper_verdicts.judge_claims(table(), whole)
    for scale in ("full", "digits"):
        verdict = paper_verdicts.table_verdict(table(), scale, whole, claims)
        assert verdict == "reproduced in part: 1 held, 1 not measured"


def test_a_renamed_row_does_not_lose_its_numbers(monkeypatch):
    plain = render.summarize(table(), "digits", numbers(A=(84.0, 50.0)), {})
    monkeypatch.setattr(
        inventory, "find_table", lambda name: table(rows=(table().row("B"),), ours={"B": "noise"}, claims=())
    )
    with pytest.raises(UserError, match=r"two was measured with a row 'A', which papers\.yaml has no more"):
        results_page.resummarize(plain)


def test_images_that_are_asked_for_are_not_shortened(tmp_path):
    options = [("train.images", 1000)]
    assert tables.recipes_of(TABLES["jeat-table2"], "cpu-30min", tmp_path, options)["trades"].train.images == 1000


def test_stages_have_the_seed_of_their_run(tmp_path, monkeypatch):
    seen = []
    run = lambda recipe: SimpleNamespace(recipe=recipe, data=None)
    patch_experiments(monkeypatch, "train_or_resume", lambda recipe, folder: seen.append(recipe) or run(recipe))
    carry_out(Experiment({"dat": studies.find_recipe("digits-dat", ())}, lambda runs: {}), tmp_path, 2)
    assert [(recipe.seed, recipe.before[0].seed) for recipe in seen] == [(0, 0), (1, 1)]


def test_a_trained_model_stands_for_a_run(tmp_path, monkeypatch, small_run, capsys):
    """With the data, threat and sampler of the row that it stands for, and without any training."""
    patch_experiments(monkeypatch, "train_or_resume", lambda *a: pytest.fail("trained"))
    recipe = binary.hybrid("at", tmp_path, ())
    recipe = dataclasses.replace(recipe, seed=3, train=dataclasses.replace(recipe.train, precision="bfloat16"))
    experiment = Experiment({"at": recipe}, lambda runs: {})
    _, (run,) = carry_out(experiment, tmp_path / "out", 1, {"at": str(small_run.folder)})
    assert (run.recipe.name, run.recipe.seed, run.recipe.train.images) == ("at", 0, 0)
    assert (run.recipe.threat, run.recipe.sampler) == (recipe.threat, recipe.sampler)
    assert run.recipe.threat != small_run.recipe.threat
    assert run.recipe.train.precision == "bfloat16"
    for has, backend in ((True, "bf16"), (False, "auto")):
        monkeypatch.setattr("advebm.models.precision.multiplies_bfloat16", lambda device, has=has: has)
        assert studies._backend(run) == backend
    x = run.data.test.take(slice(8)).float()
    assert torch.equal(run.model()[0](x), small_run.model()[0](x))
    trained = tables.provenance(SCALES["digits"], {}, [run])["trained"]
    assert trained == {"at": f"weights of {Path(run.recipe.init).name}"}
    with pytest.raises(UserError, match="there is no 'art' to stand for; there is at"):
        carry_out(experiment, tmp_path / "out", 1, {"art": str(small_run.folder)})
    assert cli.main(["reproduce", "dat", "--scale", "digits", "--row", "dat"]) == 2
    assert "--row takes NAME=MODEL, as in --row at=model.pt, got 'dat'" in capsys.readouterr().err


def test_a_scale_is_of_a_table(capsys):
    assert cli.main(["reproduce", "--scale", "digits"]) == 2
    assert "--scale is of a table; name one of" in capsys.readouterr().err


# The inventory's tables -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLES)
def test_claims_are_about_what_is_there_and_hold_in_the_paper(name):
    """Each side is a row and a column; where both are published, the stated one is the larger."""
    own = TABLES[name]
    assert own.scales.keys() <= SCALES.keys()
    assert own.by in tables.COMPUTATIONS
    assert all(title or key in inventory.COLUMNS for key, title in own.columns.items())
    assert own.claims
    for claim in own.claims:
        sides = paper_verdicts.claim_sides(own, claim)
        assert all(row in own.names() and key in own.columns for row, key in sides), claim
        more, less = (own.row(row).get("values", {}).get(key) for row, key in sides)
        assert more is None or less is None or more > less, claim


@pytest.mark.parametrize(("name", "scale"), [(t.name, scale) for t in TABLES.values() for scale in t.scales])
def test_every_table_is_made_of_recipes_that_resolve(name, scale, tmp_path):
    """At every scale, all but training: the same threat for all, and what its computation needs."""
    own = TABLES[name]
    entries = tables.at_scale(name, scale, tmp_path).recipes
    assert set(own.methods()) - entries.keys() <= LACKING.get(scale, LARGE)
    assert entries
    if own.by == "samplers":
        titles = {f"{method}, {row}" for method in own.methods() for row in unsupervised.rows_of(method)}
        titles |= {f"{title}, {studies.COMMON_STEPS} steps" for title in titles}
        assert {own.of(name)["method"] for name in (*own.ours, *own.beside)} <= titles
    assert own.ours.keys() <= {row["name"] for row in own.rows}
    assert all(entry.train.images > 0 for entry in entries.values())


def test_the_numbers_of_one_row_stand_in_their_columns():
    """In percent; AutoAttack's last, not what stood after its parts; another row's results are not taken."""
    own = TABLES["jeat-table2"]
    under = lambda attack, *numbers, **more: record(
        f"accuracy under {attack.name}", *numbers, attack=config.describe(attack), **more
    )
    found = [record("accuracy", 0.9), under(Attack(steps=50), 0.5, 0.02, 359)]
    part = under(AutoAttack(), 0.45, part="APGD-CE")
    found += [{**part, "name": f"{part['name']}, after APGD-CE"}]
    found += [under(AutoAttack(), 0.4), under(Attack(steps=10), 0.6), under(Attack(steps=50, loss="energy"), 0.7)]
    found += [{**under(CW(c=0.2), 0.8), "seeds": 3}]
    cells = paper_verdicts.table_cells(own, {"TRADES": found, "standard": found[:1], "nobody": found})
    assert cells.keys() == {"TRADES", "standard"}
    assert {key: cell["value"] for key, cell in cells["TRADES"].items()} == {
        "clean": 90,
        "pgd50": 50,
        "cw": 80,
        "aa": 40,
    }
    about = {"value": 50.0, "error": 2.0, "n": 359, "seeds": 1, "measured": "accuracy under PGD-50 linf 8/255"}
    assert cells["TRADES"]["pgd50"] == about
    assert cells["TRADES"]["cw"]["seeds"] == 3
    assert cells["standard"].keys() == {"clean"}


def test_a_table_may_have_a_method_a_column():
    """Of table 4 a column is a run and a row a set of images, at a small scale the classes that p0 has not."""
    own = TABLES["binary-at-table4"]
    names = ("cifar100, 80 classes", "cifar100, 20 other classes", "cifar100, 20 other classes, APGD-100 l2 1")
    about = [{"outliers": name.partition(", APGD")[0], "score": "energy"} for name in names]
    about[2]["attack"] = "APGD-100 l2 1"
    run = lambda base: [record(f"AUROC vs {n}", base + i / 10, **about[i]) for i, n in enumerate(names)]
    cells = paper_verdicts.table_cells(own, {"oe": run(0.1), "binary-at": run(0.5)})
    assert {key: cell["value"] for key, cell in cells["CIFAR-100, standard"].items()} == {"oe": 20, "ours": 60}
    assert cells["CIFAR-100, worst case"]["ours"]["value"] == 70
    assert cells.keys() == {"CIFAR-100, standard", "CIFAR-100, worst case"}
    whole = [record("AUROC vs cifar100", 0.3, outliers="cifar100", score="energy")]
    assert paper_verdicts.table_cells(own, {"oe": whole})["CIFAR-100, standard"]["oe"]["value"] == 30


def test_a_table_may_have_a_sampler_a_row():
    own = TABLES["cem-table2"]
    values, space = {"FD": 7.0, "class score": 8.0}, "features of x"
    found = {"at, cond, TA": [record(f"{q} ({space})", v, space=space) for q, v in values.items()]}
    (name,) = paper_verdicts.table_cells(own, found)
    assert name == "supervised, cond, TA"
    plain = render.summarize(own, "digits", paper_verdicts.table_cells(own, found), {})
    row = next(row for row in plain["rows"] if row["ours"])
    assert row["published"] == {"is": 9.26, "fid": 56.72}
    heads, (line,) = render.text_table(plain)
    assert heads[2:6] == [
        "IS, paper",
        "class score (features of x), ours (n)",
        "FID, paper",
        "FD (features of x), ours (n)",
    ]
    assert line[2:6] == ["9.26", "8.00 ± 0.01 (100)", "56.72", "7.00 ± 0.01 (100)"]


# Verdicts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "verdicts", "whole"),
    [
        (numbers(A=(80.0, 50.0), B=(90.0, 20.0)), [HOLDS, HOLDS], "reproduced in shape: 2 held"),
        (numbers(A=(95.0, 50.0), B=(90.0, 20.0)), [HOLDS, FAILS], "not reproduced: 1 held, 1 failed"),
        (numbers(A=(88.0, 50.0), B=(90.0, 20.0)), [HOLDS, FAILS], "not reproduced: 1 held, 1 failed"),
        (numbers(A=(95.0, 50.0)), [NONE, NONE], "not measured"),
    ],
)
def test_shape_is_that_each_claim_holds_beyond_two_errors(found, verdicts, whole):
    """The joint error is √2: a difference of 2 is within two of it, and the paper's 6 more than two above 2."""
    plain = render.summarize(table(), "digits", found, {})
    assert [claim["verdict"] for claim in plain["claims"]] == verdicts
    assert plain["verdict"] == whole
    if verdicts[0] == HOLDS:
        assert plain["claims"][0]["difference"] == 30
        assert plain["claims"][0]["published"] == 30
        assert plain["claims"][0]["error"] == pytest.approx(2**0.5)
        assert plain["rows"][0]["verdict"] == whole.partition(": ")[2]


@pytest.mark.parametrize(
    ("difference", "published", "verdict"),
    [
        *((difference, 1.99, UNRESOLVED) for difference in (-50.0, 0.0, 50.0)),  # could not be seen, whatever is seen
        (2.01, 2.0, HOLDS),
        (1.99, 2.0, UNRESOLVED),
        (-0.01, 2.0, FAILS),
        (-50.0, 2.0, FAILS),
        (0.99, 3.0, FAILS),  # no difference where the paper's would have been seen
        (1.01, 3.0, UNRESOLVED),
        (1.99, 4.0, FAILS),
        (2.01, 50.0, HOLDS),  # the sign is what counts
        (2.01, None, HOLDS),
        (-2.01, None, FAILS),
        (-1.99, None, UNRESOLVED),
        (1.99, None, UNRESOLVED),
    ],
)
def test_a_claim_is_resolvable_if_the_papers_difference_is_two_errors_of_ours(difference, published, verdict):
    assert paper_verdicts.claim_verdict(difference, 1.0, published) == verdict
    assert paper_verdicts.claim_verdict(7 * difference, 7.0, published and 7 * published) == verdict


@pytest.mark.parametrize(("error", "verdict"), [(0.70, HOLDS), (0.71, UNRESOLVED)])
def test_scores_of_other_features_are_compared_by_their_relative_difference(error, verdict):
    """The paper's 110 and 90 differ by 20 %, as our 11 and 9 do, whose joint error is 9.9 or 10.04 %."""
    rows = [{"name": n, "values": {"fid": v}, "status": "runnable"} for n, v in (("A", 110.0), ("B", 90.0))]
    own = table(rows=tuple(rows), columns={"fid": ""}, claims=("fid: A > B",))
    cell = lambda value: {"fid": {"value": value, "error": error, "n": 100, "seeds": 1, "measured": "m"}}
    (judgement,) = paper_verdicts.judge_claims(own, {"A": cell(11.0), "B": cell(9.0)})
    assert judgement["verdict"] == verdict
    assert (judgement["difference"], judgement["published"]) == (pytest.approx(20), pytest.approx(20))
    assert judgement["error"] == pytest.approx(100 * error * 2**0.5 / 10)


def test_a_table_is_judged_by_what_can_be_resolved():
    """With errors of 4 the 6 points of the second claim cannot be seen; the 30 of the first can."""
    found = numbers(A=(95.0, 50.0), B=(90.0, 20.0))
    for cells in found.values():
        cells["clean"]["error"] = 4.0
    plain = render.summarize(table(), "digits", found, ABOUT)
    assert plain["verdict"] == "reproduced in shape: 1 held, 1 not resolvable"
    assert render.text_lines(plain)[1][1] == "clean: B > A by -5.00 ± 5.66 points (paper: 6.00): not resolvable"
    assert render.summarize(table(claims=("clean: B > A",)), "digits", found, {})["verdict"] == (
        "undecided: 1 not resolvable"
    )
    assert render.summarize(table(), "digits", numbers(B=(90.0, 20.0)), {})["rows"][0]["verdict"] == ""


def test_claims_on_doubtful_numbers_are_told_and_do_not_count():
    rows = tuple({**row, "status": "doubtful" if row["name"] == "B" else "runnable"} for row in table().rows)
    rows += ({"name": "C", "values": {"aa": 10.0}, "status": "quoted"},)
    own = table(rows=rows, claims=("clean: B > A", "aa: A > C"))
    found = {**numbers(A=(95.0, 50.0), B=(90.0, 20.0), C=(10.0, 10.0))}
    plain = render.summarize(own, "digits", found, {})
    assert [(c["verdict"], c["doubtful"]) for c in plain["claims"]] == [(FAILS, True), (HOLDS, False)]
    assert plain["verdict"] == "reproduced in shape: 1 held"
    assert [row["verdict"] for row in plain["rows"]] == [
        "1 held",
        "1 failed",
        plain["rows"][0]["verdict"],
    ]
    assert render.text_lines({**plain, "about": ABOUT})[1][0].endswith("fails (on a doubtful number: does not count)")


def test_numbers_are_compared_with_the_papers_at_full_scale_alone():
    """Within two joint errors (the paper's deviation counts) or the tolerance; else the claims decide."""
    same = numbers(A=(85.9, 47.3), B=(90.0, 18.1))
    of = lambda found, scale="full": render.summarize(table(), scale, found, {})
    assert of(same)["verdict"] == "reproduced"
    assert [row["verdict"] for row in of(same)["rows"]] == ["reproduced", "reproduced"]
    assert of(same, "digits")["verdict"] == "reproduced in shape: 2 held"
    far = numbers(A=(86.1, 46.9), B=(90.0, 18.1))
    assert of(far)["verdict"] == "reproduced in shape: 2 held"
    assert of(far)["rows"][0]["verdict"] == "not reproduced: clean %, AutoAttack %"
    precise = {row: {key: {**cell, "error": 0.01} for key, cell in cells.items()} for row, cells in same.items()}
    assert of(precise)["rows"][1]["verdict"] == "not reproduced: AutoAttack %"
    precise["B"]["aa"]["value"] = 19.1  # within the tolerance of a point
    assert of(precise)["rows"][1]["verdict"] == "reproduced"


# Scales ---------------------------------------------------------------------------------------------------------------


def test_a_scale_has_its_own_size_of_recipes(tmp_path):
    """On a GPU with a larger network; options that a recipe has no use for are left out."""
    own, options = TABLES["dat"], [("outside.count", 70), ("optimizer.lr", 0.5)]
    dat = tables.recipe_of(own, "cpu-30min", "dat", tmp_path, options)
    assert (dat.before[0].train.images, dat.train.images) == (60_000, 24_000)  # in proportion: 300,000 and 120,000
    assert (dat.outside.count, dat.optimizer.lr) == (70, 0.5)
    jem = tables.recipe_of(own, "cpu-30min", "jem", tmp_path, options)
    assert (jem.outside, jem.optimizer.lr) == (None, 0.5)
    large = tables.recipe_of(own, "gpu-30min", "dat", tmp_path, ())
    assert (large.backbone.depth, large.backbone.width) == (18, 64)
    long = tables.recipe_of(own, "cpu-2h", "dat", tmp_path, ())
    assert (long.backbone.depth, long.backbone.width, long.before[0].train.images) == (18, 32, 1_200_000)
    assert tables.recipe_of(own, "cpu-2h", "ratio", tmp_path, ()) is None
    assert tables.recipe_of(own, "full", "dat", tmp_path, ()) == studies.find_recipe("cifar10-dat", ())
    digits = binary.hybrid("ratio", tmp_path, ())
    assert tables.recipe_of(own, "digits", "ratio", tmp_path, ()) == digits
    assert tables.recipe_of(own, "cpu-30min", "acl-resnet50", tmp_path, ()) is None


@pytest.mark.parametrize(
    ("name", "scale"),
    [(t.name, s) for t in TABLES.values() for s in t.scales if s not in ("full", "cpu-2h") and t.by != "attacks"],
)
def test_the_rows_of_a_table_see_equally_many_images(name, scale, tmp_path):
    """In their first stage, counting what FREE uses again; with the same labels, but for the judge of samples."""
    own = TABLES[name]
    rows = {m: r for m, r in tables.recipes_of(own, scale, tmp_path, ()).items() if m in own.methods()}
    first = {method: recipe.before[0] if recipe.before else recipe for method, recipe in rows.items()}
    uses = {method: getattr(stage.objective, "replays", 1) for method, stage in first.items()}
    assert {method: uses[method] * stage.train.images for method, stage in first.items()} == dict.fromkeys(
        rows, own.images(scale)
    )
    assert all(count == (8 if method == "free" else 1) for method, count in uses.items())
    if "acl" not in rows:  # whose augmentation is another
        assert len({str(config.describe(recipe.data)) for recipe in rows.values()}) == 1
    if "rst-awp" in rows:
        assert rows["rst-awp"].extra == dataclasses.replace(rows["trades"].data, rest=True)


def test_jem_is_drawn_by_the_dynamics_of_its_training(tmp_path):
    """From noise, not from Gaussians of the data, and not with the defaults."""
    recipe = binary.hybrid("jem", tmp_path, ())
    for own in (TABLES["binary-at-table2"].of("JEM"), TABLES["jeat-figure6"].of("JEM")):
        sampler = recipe.with_sampler(own["sampler"], [("sampler.start", own["start"])]).sampler
        assert (type(sampler).__name__, sampler.start) == ("SGLD", "noise")
        assert (sampler.step_size, sampler.noise) == (0.1, 0.01)
    assert unsupervised.rows_of("jem") == {"SGLD": ("sgld", "noise")}
    assert recipe.with_sampler("cs").sampler.step_size == recipe.sampler.step_size


def test_detection_is_by_the_scores_of_the_papers(tmp_path, monkeypatch):
    """Classifiers, JEM among them, by confidence, critics by energy; what JEM's energy finds stands beside."""
    recipes = {method: binary.hybrid(method, tmp_path, ()) for method in ("oe", "jem", "ratio", "binary-at")}
    own = TABLES["binary-at-table4"]
    assert isinstance(tables.recipe_of(own, "digits", "binary-at", tmp_path, ()).objective.radius, float)
    found: dict[str, list] = {}

    def measure(run, wanted):
        ((key, metric),) = wanted.items()
        (score,) = metric.scores
        assert key.by == score.name
        value = {"energy": 0.1, "max-softmax": 0.9}[score.name]
        about = {"outliers": "uniform", "score": score.name, "metric": {}}
        new = {**record(f"AUROC {score.name} vs uniform", value, **about), "time": "now"}
        found.setdefault(run.recipe.name, []).append(new)
        return [new]

    monkeypatch.setattr(binary, "measure_missing", measure)
    runs = {
        method: SimpleNamespace(recipe=recipe, records=lambda name=recipe.name: found[name])
        for method, recipe in recipes.items()
    }
    results = binary.detection_by(recipes, ("uniform",)).measure(runs)
    cells = paper_verdicts.table_cells(own, results)["uniform noise, standard"]
    assert {key: cell["value"] for key, cell in cells.items()} == {
        "oe": 90,
        "jem": 90,
        "jem_energy": 10,
        "ratio": 90,
        "ours": 10,
    }
    heads, (line,) = render.text_table({**render.summarize(own, "digits", {"uniform noise, standard": cells}, {})})
    assert heads[4:7] == ["jem %, paper", "AUROC vs uniform %, ours (n)", "AUROC vs uniform %, ours (n)"]
    assert line[4:7] == ["11.8", "90.00 ± 1.00 (100)", "10.00 ± 1.00 (100)"]


def test_the_teacher_has_the_labels_of_its_pupil(tmp_path, monkeypatch):
    trained = {}
    patch_experiments(monkeypatch, "train_or_resume", lambda recipe, folder: trained.update({folder: recipe}))
    for scale in ("digits", "cpu-30min"):
        entries = tables.recipes_of(TABLES["jeat-table2"], scale, tmp_path, [])
        assert entries["rst-awp"].objective.objective.teacher == str(tmp_path / "teacher")
        supervised.train_teacher(entries, tmp_path)
        teacher = trained[tmp_path / "teacher"]
        assert isinstance(teacher.data, Part)
        assert not teacher.data.rest
        assert (
            dataclasses.replace(teacher, data=entries["standard"].data, name=entries["standard"].name)
            == entries["standard"]
        )


def test_all_rows_are_measured_under_the_threat_of_the_first(tmp_path, monkeypatch):
    """And a row may be what a run was before its last stage."""
    seen = {}
    own = TABLES["dat"]
    entries = tables.recipes_of(own, "cpu-30min", tmp_path, [])
    for folder in ("dat", "dat/before/0-at", "ratio", "jem"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.yaml").touch()
    stage = dataclasses.replace(entries["dat"].before[0], name="at")
    (tmp_path / "dat" / "config.yaml").write_text(dump(dataclasses.replace(entries["dat"], before=(stage,))))
    runs = {method: Run(tmp_path / method) for method in ("dat", "ratio", "jem")}

    def numbers(table, scale, run, threat, features, sampler):
        assert features == "cifar10-infonce"
        seen[str(run.folder.relative_to(tmp_path))] = threat
        return []

    monkeypatch.setattr(tables, "numbers", numbers)
    found = tables.by_methods(own, SCALES["cpu-30min"], entries).measure(runs)
    assert list(found) == ["DAT", "adversarial training (stage 1)", "RATIO", "JEM"]
    assert list(seen) == ["dat", "dat/before/0-at", "ratio", "jem"]
    assert set(seen.values()) == {entries["dat"].threat} != {entries["jem"].threat}


def test_what_cannot_be_carried_out_is_refused(tmp_path, capsys):
    def refused(*words):
        assert cli.main(["reproduce", *words, "--out", str(tmp_path / "out")]) == 2
        return capsys.readouterr().err

    assert "no table 'jeat-tabel2' (did you mean 'jeat-table2'?)" in refused("jeat-tabel2", "--scale", "digits")
    assert "no scale 'tiny'; there is cpu-2h, cpu-30min, digits, full, gpu-30min" in refused("dat", "--scale", "tiny")
    assert "binary-at-table3 has no scale 'digits'; it has full" in refused("binary-at-table3", "--scale", "digits")
    assert "say how large with --scale, one of full, gpu-30min, cpu-30min, digits" in refused("jeat-table2")
    assert "--quick is of experiments" in refused("dat", "--scale", "digits", "--quick")
    assert "no option --metrics" in refused("dat", "--scale", "digits", "--metrics", "accuracy")
    assert "seeds must be at least 1" in refused("dat", "--scale", "digits", "--seeds", "0")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.yaml").touch()
    assert "is a run; --out takes a folder for the whole table" in refused("dat", "--scale", "digits")


@few_samples
def test_a_table_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    """Two small networks: trained, attacked, drawn from, judged and printed once; then nothing is done again."""
    short = {"train__images": 512, "train__validate_every": 512, "sampler__steps": 2}
    families = {"tiny": lambda method, folder, options: tiny(f"digits-{method}", **short)}
    own = table(columns=dict.fromkeys(("clean", "cw", "is", "fid"), ""), claims=("clean: B > A",))
    small = Scale("a test", images=12, samples=40, version="quick", features=None, trials=60)
    monkeypatch.setattr(inventory, "tables", lambda: {"two": own})
    monkeypatch.setattr(tables, "FAMILIES", families)
    monkeypatch.setitem(SCALES, "digits", small)
    monkeypatch.setattr(studies, "STEPS", (1, 2))
    monkeypatch.setattr(studies, "COMMON_STEPS", 2)
    monkeypatch.setattr(studies, "BALLS", (None,))
    path = experiments.reproduce("two", tmp_path, scale="digits", options=[("seed", 0)])
    plain, (printed, shown) = json.loads(path.read_text()), capsys.readouterr()
    assert "noise: SampleQuality" in shown
    assert "C&W-50 l2 c=0.2  12/12" in shown
    rows = {row["name"]: row for row in plain["rows"]}
    assert {key: cell["n"] for key, cell in rows["A"]["ours"].items()} == {"clean": 359, "cw": 12, "is": 40, "fid": 40}
    assert [row["published"] for row in plain["rows"]] == [{"clean": 84.0}, {"clean": 90.0}]
    runs = {name: Run.open(tmp_path / "seed-0" / name) for name in ("at", "noise", "standard")}
    accuracy = next(r for r in runs["noise"].records() if r["name"] == "accuracy")
    assert rows["B"]["ours"]["clean"]["value"] == 100 * accuracy["value"]
    assert rows["B"]["ours"]["fid"]["measured"] == "FD (features of standard)"
    (tuned,) = (runs["noise"].folder / "tuned").iterdir()
    assert rows["B"]["ours"]["fid"]["sampler"] == json.loads(tuned.read_text())["sampler"]
    assert "samplers: A: " in printed
    assert plain["about"]["command"] == "advebm reproduce two --scale digits --seed 0"
    assert plain["about"]["trained"]["at"] == f"512 images of {len(runs['at'].recipe.data.load().train):,}"
    assert plain["about"]["hardware"].startswith("cpu, ")
    assert "FID, paper" not in printed, "the paper has none"
    assert "clean %, paper" in printed
    assert f"verdict: {plain['verdict']}" in printed
    assert (tmp_path / "two-digits.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "report.html").read_text()
    assert f"<td>{rows['B']['published']['clean']:g}</td>" in page
    assert f"<li>verdict: {plain['verdict']}" in page
    assert "<p>recipe at · 512 training images seen" in page, "who judges comes last"
    again = lambda *a, **k: pytest.fail("done again")
    for name in ("fit", "draw_set"):
        patch_experiments(monkeypatch, name, again)
    monkeypatch.setattr(compare.evaluate, "evaluate_run", again)
    monkeypatch.setattr(generate, "generate_along", again)
    for run in runs.values():  # what was measured on another day, and since then on other images, is not the table's
        before = [{**r, "time": r["time"].replace(r["time"][:10], "2026-01-01")} for r in run.records()]
        others = [{**r, "value": 0.123, "settings": {**r["settings"], "images": 99}} for r in before]
        files.write_json(run.folder / "metrics.json", [*before, *(r for r in others if "attack" in r["settings"])])
    plain["about"]["date"] = "2026-01-01"
    assert (
        json.loads(experiments.reproduce("two", tmp_path, scale="digits", options=[("seed", 0)]).read_text()) == plain
    )
    monkeypatch.undo()
    monkeypatch.setattr(inventory, "tables", lambda: {"two": own})
    assert results_page.resummarize(plain) == plain


def test_samples_are_judged_by_a_network_that_saw_no_labels(tmp_path):
    """On CIFAR-10; on digits by a standard classifier, and at full scale by Inception."""
    own = TABLES["cem-table2"]
    assert "standard" not in tables.recipes_of(own, "cpu-2h", tmp_path, ())
    assert next(iter(tables.recipes_of(own, "digits", tmp_path, ()))) == "standard"
    runs = {"standard": SimpleNamespace(folder=tmp_path)}
    spaces = {scale: tables.features_of(SCALES[scale], runs) for scale in own.scales}
    assert spaces.pop("digits") == tmp_path
    assert spaces.pop("full") == "inception"
    assert set(spaces.values()) == {"cifar10-infonce"}


def test_settings_of_samplers_are_listed():
    """Those that were searched; the baseline, which takes no step, has none."""
    sampler = {"kind": "ta", "steps": 16, "step_size": 0.25, "noise": 0.0, "radius": None}
    assert render.format_sampler(sampler) == "16 steps of 0.25"
    narrow = {**sampler, "noise": 0.01, "radius": 2.0}
    assert render.format_sampler(narrow) == "16 steps of 0.25, noise 0.01, within 2 of the seed"
    found = {
        title: [record("FD (features of x)", 7.0, space="features of x", sampler=settings)]
        for title, settings in (
            ("at, cond, TA", sampler),
            ("at, cond, TA, 16 steps", narrow),
            ("at, cond, no steps", {**sampler, "steps": 0}),
        )
    }
    own = TABLES["cem-table2"]
    _, lines = render.text_lines(
        render.summarize(own, "digits", paper_verdicts.table_cells(own, found), results_about())
    )
    listed = ["supervised, cond, TA: 16 steps of 0.25"]
    listed += ["at, cond, TA, 16 steps: 16 steps of 0.25, noise 0.01, within 2 of the seed"]
    assert lines[0] == f"samplers: {'; '.join(listed)}"
    published = sum(row["status"] != "unpublished" for row in own.rows)
    assert f"{published - 1} of the paper's {published} rows have no number here" in lines


def results_about():
    return {"settings": "s", "seeds": 1, "hardware": "h", "date": "d"}


def test_the_picture_of_a_table_has_first_stages(monkeypatch):
    """Each stage that was drawn from under the table's name, beside the one it led to."""
    stage = lambda name, *sets: SimpleNamespace(
        recipe=SimpleNamespace(name=name), data=Digits().load(), samples=lambda: dict.fromkeys(sets, name)
    )
    first, last = stage("first", "two"), stage("last", "two", "other")
    runs = [SimpleNamespace(**vars(run), stages=found) for run, found in ((stage("judge"), []), (last, [first, last]))]
    monkeypatch.setattr(
        generate, "read_set", lambda name: SimpleNamespace(x=torch.zeros(20, 1, 8, 8), y=torch.arange(20) % 10)
    )
    monkeypatch.setattr(figures, "grids", lambda panels, texts: " ".join(panels).encode())
    assert tables.samples_picture(table(), runs) == b"first last"
    assert tables.samples_picture(table(), runs[:1]) is None


# The page -------------------------------------------------------------------------------------------------------------

ABOUT = {
    "settings": "small",
    "seeds": 2,
    "hardware": "a machine",
    "date": "2026-01-01",
    "command": "advebm x",
    "trained": {},
}

in_a_checkout = pytest.mark.skipif(not (ROOT / "docs").exists(), reason="there are no documents beside the tests")


@in_a_checkout
def test_the_page_is_what_the_files_give():
    """make results has been run since they, or what the papers publish, changed."""
    found = results_page.load(ROOT / "results")
    assert found
    for name, plain in found.items():
        assert files.read_json(ROOT / "results" / f"{name}.json") == plain, name
        assert plain["about"]["command"].startswith(f"advebm reproduce {plain['table']} --scale {plain['scale']}")
    pictures = [path.stem for path in (ROOT / "results").glob("*.png")]
    assert set(pictures) <= found.keys()
    page = (ROOT / "docs" / "results.md").read_text()
    assert page == results_page.page(found, pictures)
    for path in re.findall(r"\]\((\.\./[^)]+)\)", page):
        assert (ROOT / "docs" / path).exists(), path


@in_a_checkout
def test_numbers_of_runs_of_another_length_are_marked(tmp_path):
    """A row or column of a run that is now trained on another number of images says so."""
    for name, plain in results_page.load(ROOT / "results").items():
        own, about = TABLES[plain["table"]], plain["about"]
        methods = {key: title.partition(", ")[0] for key, title in own.columns.items() if title}
        methods = methods or {r["name"]: own.of(r["name"])["method"].partition(", ")[0] for r in plain["rows"]}
        for place, method in methods.items():
            if not any(row["ours"] and (row["name"] == place or place in row["ours"]) for row in plain["rows"]):
                continue
            recipe = tables.recipe_of(own, plain["scale"], method, tmp_path, ())
            length, _, rest = about["trained"][method].partition(" ")
            if length == "weights":  # of --row
                assert f"--row {method}={rest.removeprefix('of ')}" in about["command"]
            elif int(length.replace(",", "")) != recipe.train.images:
                assert place in about.get("former", {}), f"{name}: {place}"


def test_the_page_has_the_papers_numbers_ours_and_the_verdict(tmp_path, monkeypatch):
    rows = tuple({**row, "note": "a note", "code": {"aa": 21.0}} if row["name"] == "B" else row for row in table().rows)
    rows += ({"name": "Quoted", "values": {"clean": 1.0}, "status": "quoted"},)
    own = table(rows=rows, why={"digits": "A fact"})
    monkeypatch.setattr(inventory, "tables", lambda: {"two": own})
    plain = render.summarize(own, "digits", numbers(A=(95.0, 50.0), B=(90.0, 20.0)), ABOUT)
    (tmp_path / "results").mkdir()
    (tmp_path / "docs").mkdir()
    files.write_json(tmp_path / "results" / "two-digits.json", {**plain, "verdict": "of another day"})
    (tmp_path / "results" / "two-digits.png").touch()
    results_page.write(tmp_path)
    page = (tmp_path / "docs" / "results.md").read_text()
    heads = "| clean %, paper | m %, ours (n) | AutoAttack %, paper | m %, ours (n) | reference code | verdict |"
    line = "| B |  | 90 | 90.00 ± 1.00 (100) | 20 | 20.00 ± 1.00 (100) | AutoAttack % 21 | 1 held, 1 failed |"
    for text in (
        heads,
        line,
        "- clean: B > A by -5.00 ± 1.41 points (paper: 6.00): fails",
        "1 of the paper's 3 rows have no number here",
    ):
        assert text in page
    assert "- verdict: not reproduced: 1 held, 1 failed. A fact" in page
    assert "scale digits: small; 2 training seeds; a machine; 2026-01-01." in page
    assert "B: a note" in page
    assert "](../results/two-digits.png)" in page
    assert "Quoted" not in page
    assert files.read_json(tmp_path / "results" / "two-digits.json") == plain
    (tmp_path / "results" / "two-digits.json").rename(tmp_path / "results" / "three.json")
    with pytest.raises(UserError, match=r"three.json is not named TABLE-SCALE"):
        results_page.load(tmp_path / "results")


def test_numbers_of_former_settings_are_marked(monkeypatch):
    """In their row or column, their claims, the list of tables; measured again, they are not."""
    monkeypatch.setattr(inventory, "tables", lambda: {"two": table()})
    found = numbers(A=(95.0, 50.0), B=(90.0, 20.0))
    plain = render.summarize(table(), "digits", found, {**ABOUT, "former": {"A": "half of the images", "aa": "one"}})
    assert results_page.resummarize(plain) == plain
    page = results_page.page({"two-digits": plain}, [])
    for text in (
        "| A | former settings | 84 |",
        "| B |  | 90 |",
        "AutoAttack %, paper | m %, ours (n), former settings |",
        "fails (former settings)",
        "1 failed (former settings) |",
        "Former settings, to be measured again: A: half of the images; AutoAttack %: one.",
    ):
        assert text in page, text
    assert (
        "former settings"
        not in results_page.page({"two-digits": render.summarize(table(), "digits", found, ABOUT)}, []).partition(
            "Verdicts are computed"
        )[2]
    )


def test_every_scale_says_what_was_never_run():
    assert "never run" in SCALES["gpu-30min"].about
    assert "not run here" in SCALES["full"].about
    assert all(re.fullmatch(r"[\w-]+", name) for name in recipes.names())
