"""Keys of records: every metric's own records, by hand; and what tables ask for."""

import dataclasses

import pytest
import torch

from advebm.attacks.apgd import APGD
from advebm.attacks.autoattack import AutoAttack
from advebm.attacks.base import Adversary
from advebm.attacks.cw import CW
from advebm.attacks.projected import Attack, fgsm
from advebm.core import config
from advebm.edits.restore import Upsample
from advebm.metrics.base import Subject
from advebm.metrics.calibration import Calibration
from advebm.metrics.corruption import CorruptionAccuracy
from advebm.metrics.detectors import Detectors
from advebm.metrics.energy import Energies
from advebm.metrics.keys import AttackKey, Key, attack_key, first_match, key_of, label, matches
from advebm.metrics.ood import EnergyScore, OutOfDistribution
from advebm.metrics.probing import LinearProbe, NearestNeighbours
from advebm.metrics.quality import SampleQuality
from advebm.metrics.restoration import Counterfactuals, Restoration
from advebm.metrics.robustness import Accuracy, RobustAccuracy, TargetedAccuracy
from advebm.metrics.texts import as_text
from advebm.runs.find_space import feature_space
from advebm.sampling import generate

PGD = Attack(eps=0.5, norm="l2", steps=2)
UNDER = AttackKey("PGD", 2, "PGD-2 l2 0.5")
SPACE = "features of one"
SCALED = " after temperature scaling"
METRICS = {
    "accuracy": (Accuracy(), {Key("accuracy")}),
    "robust": (RobustAccuracy(PGD, images=20), {Key("accuracy", UNDER)}),
    "parts": (
        RobustAccuracy(AutoAttack(0.01, "l2", "rand"), images=2),
        {
            Key("accuracy", AttackKey("AutoAttack", None, "AutoAttack rand l2 0.01")),
            Key("accuracy", AttackKey("AutoAttack", None, "AutoAttack rand l2 0.01", "APGD-CE")),
        },
    ),
    "targeted": (TargetedAccuracy(PGD), {Key("accuracy", AttackKey("targeted PGD", 2, "targeted PGD-2 l2 0.5"))}),
    "probe": (
        LinearProbe(attack=PGD),
        {Key("accuracy", by="a linear probe"), Key("accuracy", UNDER, by="a linear probe")},
    ),
    "neighbours": (NearestNeighbours(3), {Key("accuracy", by="3 nearest neighbours")}),
    "corruptions": (
        CorruptionAccuracy(("gaussian-noise",), (3,)),
        {Key("accuracy", set="gaussian-noise 3"), Key("accuracy", set="corruptions")},
    ),
    "energies": (
        Energies(20),
        {Key("E(x)", set="test images"), Key("E(x)", samples="drawn"), Key("E(x)", set="uniform noise")},
    ),
    "calibration": (
        Calibration(),
        {
            Key("temperature"),
            *(Key(f"{q}{scaled}") for q in ("ECE", "MCE", "NLL", "Brier score") for scaled in ("", SCALED)),
        },
    ),
    "detection": (
        OutOfDistribution((EnergyScore(),), count=20, eps=0.1, steps=2, restarts=1),
        {
            Key(quantity, attack, set=outliers, by="energy")
            for quantity in ("AUROC", "AUPR-ID", "AUPR-OOD", "fpr95_id_recall", "fpr95_ood_recall")
            for attack in (None, AttackKey("APGD", 2, "APGD-2 l2 0.1"))
            for outliers in ("uniform", "gaussian", "class-gaussian")
        },
    ),
    "detectors": (
        Detectors(20, steps=2),
        {Key("AUROC of detectors"), Key("AUROC of detectors", AttackKey("APGD", 2, "APGD-2 l2 0.9"))},
    ),
    "quality": (
        SampleQuality(overlap=20),
        {
            Key(quantity, samples="drawn", space=SPACE)
            for quantity in (
                *("FD", "KID", "precision", "recall", "density", "coverage", "class score", "intended class"),
            )
        },
    ),
    "restoration": (
        Restoration((Upsample(2),), images=5),
        {
            Key(quantity, set="upsampling x2", by=way)
            for quantity in ("PSNR", "SSIM")
            for way in ("energy", "blocks", "bicubic")
        },
    ),
    "counterfactuals": (
        Counterfactuals(images=20),
        {
            Key("counterfactual reached"),
            Key("counterfactual distance"),
            Key("counterfactual named so", space=SPACE),
        },
    ),
}


@pytest.fixture(scope="module")
def subject(small_run):
    model, data = small_run.model()[0], small_run.data
    drawn = generate.generate(model, small_run.recipe.sampler, data, torch.arange(30) % 10)
    space = feature_space(SPACE, model)
    return Subject(model, data, data.test, small_run.recipe.threat, {"drawn": drawn}, space)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", METRICS)
def test_every_record_of_a_metric_has_the_key_that_its_name_says(name, subject, generator):
    metric, expected = METRICS[name]
    records = [dataclasses.asdict(record) for record in metric(subject, generator)]
    assert {key_of(record) for record in records} == expected
    for record in records:  # what people read names the key's parts
        for part in (key_of(record).samples, key_of(record).set, key_of(record).by):
            assert part is None or part in f"{record['name']} {record['settings'].get('samples')}"


def test_every_metric_is_keyed_here():
    known = {config.describe(metric)["kind"] for metric, _ in METRICS.values()}
    assert set(config.KINDS["metric"]) - known <= {"robustness-curve"}  # whose records are robust-accuracy's


@pytest.mark.parametrize(
    "attack", [PGD, fgsm(0.1), Attack(loss="energy"), Attack(loss="margin"), APGD(), CW(), AutoAttack()]
)
def test_the_key_of_an_attack_is_that_of_its_records(attack):
    record = {"name": f"accuracy under {attack.name}", "settings": {"attack": config.describe(attack)}}
    assert key_of(record) == Key("accuracy", attack_key(attack))


def test_kinds_of_attacks_are_told_apart():
    kinds = [fgsm(0.1), Attack(), Attack(loss="energy", steps=1, start="clean"), Attack(loss="margin"), APGD(), CW()]
    found = [attack_key(attack).kind for attack in kinds]
    assert found == ["FGSM", "PGD", "energy attack", "C&W-PGD", "APGD", "C&W"]


def test_inception_names_its_own():
    for quantity, shown in (("FD", "FID"), ("KID", "KID"), ("class score", "IS"), ("recall", "recall (inception)")):
        assert label(quantity, "inception") == shown
        settings = {"space": "inception", "samples": "a"}
        assert key_of({"name": shown, "settings": settings}) == Key(quantity, samples="a", space="inception")


def test_what_a_table_asks_for():
    key = Key("accuracy", AttackKey("PGD", 20, "PGD-20 l2 1"))
    asked = {"quantity": "accuracy", "attack": "PGD"}
    assert matches(key, asked)
    assert matches(key, {**asked, "steps": 20, "least_steps": 2})
    for other in ({"attack": None}, {"attack": "APGD"}, {"steps": 10}, {"least_steps": 21}, {"quantity": "AUROC"}):
        assert not matches(key, {**asked, **other}), other
    assert not matches(key._replace(attack=key.attack._replace(part="APGD-CE")), asked)
    assert not matches(key._replace(set="gaussian-noise 3"), asked)
    assert matches(Key("AUROC", set="b", by="energy"), {"quantity": "AUROC", "set": "b"})
    assert not matches(Key("AUROC", set="b"), {"quantity": "AUROC", "set": "a"})
    assert not matches(Key("accuracy", by="a linear probe"), {"quantity": "accuracy"})


def test_the_best_pattern_comes_first():
    records = [{"name": name, "settings": {"space": space}} for name, space in (("FD (x)", "x"), ("FID", "inception"))]
    best, any_space = {"quantity": "FD", "space": "inception"}, {"quantity": "FD"}
    assert first_match(records, (best, any_space)) is records[1]
    assert first_match(records[:1], (best, any_space)) is records[0]
    assert first_match(records, ({"quantity": "KID"},)) is None


def test_records_of_comparisons_are_known_by_their_names():
    """Which have no settings, as they are of several sets of samples."""
    for quantity in ("FD", "class score", "recall"):
        assert key_of({"name": f"{quantity} (features of a)", "settings": {}}) == Key(quantity, space="features of a")
    assert key_of({"name": "IS", "settings": {}}) == Key("class score", space="inception")


@dataclasses.dataclass(frozen=True)
class Mine(Adversary):
    """An attack that a user wrote: its name repeats a norm and a radius, and its settings give them too."""

    eps: float = 0.1
    norm: str = "linf"
    name = "mine, twice linf 0.1"


def test_what_is_not_known_keeps_its_name():
    """Records of metrics and attacks of one's own, and of earlier versions: nothing is cut, nothing raises."""
    odd = [
        {"attack": "PGD", "metric": "cosine"},
        {"attack": [1]},
        {"outliers": "svhn"},
        {"outliers": ["a"], "score": 1},
    ]
    odd += [{"samples": ["a", "b"]}, {"way": 3}, {"corruption": "fog"}, {"attack": {"steps": [1, 2]}}, {"space": 3}]
    for settings in odd:
        key = key_of({"name": "loss under fog, mean", "settings": settings})
        assert hash(key) is not None
        assert "loss" in key.quantity
        assert not key.is_share
    described = config.describe(Mine())
    for text in ("accuracy", "margin, mean", "margin, max"):
        record = {"name": f"{text} under {Mine().name}", "settings": {"attack": described}}
        assert key_of(record) == Key(text, attack_key(Mine()))
        assert key_of(record).attack.kind == "other"
    old = {"eps": 0.1, "norm": "linf", "steps": 20, "loss": "energy", "start": "uniform"}  # before attacks had kinds
    record = {"name": "accuracy under energy attack-20 linf 0.1", "settings": {"attack": old}}
    assert key_of(record).attack == AttackKey("energy attack", 20, "energy attack-20 linf 0.1")
    assert key_of({"name": "accuracy top 5", "settings": {}}).is_share


@pytest.mark.parametrize(
    ("name", "text"), [("accuracy", "50.0 ± 1.0 %"), ("accuracy of x", "50.0 ± 1.0 %"), ("ECE", "0.500 ± 0.010")]
)
def test_shares_are_in_percent(name, text):
    assert as_text({"name": name, "value": 0.5, "error": 0.01, "count": 9, "settings": {}})["value"] == text
