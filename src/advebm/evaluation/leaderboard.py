"""The protocol by which a leaderboard measures its models, and what it measured."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from advebm.attacks.autoattack import AutoAttack
from advebm.attacks.base import Adversary
from advebm.attacks.projected import Attack
from advebm.core import config, files, notebook
from advebm.core.errors import unknown_name
from advebm.data.ood_sets import ClassGaussianNoise, GaussianNoise, Noise, UniformNoise
from advebm.data.sources import Data
from advebm.evaluation.compare import Wanted, accuracy_metrics, space_name
from advebm.metrics.keys import Key, key_of
from advebm.metrics.ood import EnergyScore, OutOfDistribution
from advebm.metrics.quality import SampleQuality
from advebm.metrics.texts import caution, short_text
from advebm.models.hub import bundled_models
from advebm.runs.find_model import digest, find_model
from advebm.runs.find_space import ClassifierFeatures, find_space
from advebm.runs.run import Run
from advebm.samplers.base import Sampler
from advebm.samplers.classifier import CS
from advebm.sampling import generate
from advebm.training.hardware import describe_device

OUTLIERS: tuple[Noise, ...] = (UniformNoise(), GaussianNoise(), ClassGaussianNoise())  # which are always here
SAMPLER = CS(steps=16, step_size=0.25)  # of every leaderboard, unless options change it
TIMED = 100  # images that are drawn to take the time
SECONDS = f"seconds per {TIMED} drawn images"


@dataclass(frozen=True)
class Tier:
    """How much a leaderboard measures.

    Attributes:
        attack: what robust accuracy is taken under, for a ball given as an attack.
        images: number of test images to attack.  None: all.
        samples: number of images to draw, of all classes together.
        outliers: number of images of each set of outliers, and of the data.
    """

    attack: Callable[[Attack], Adversary]
    images: int | None
    samples: int
    outliers: int


TIERS: Mapping[str, Tier] = MappingProxyType(
    {
        "quick": Tier(lambda ball: Attack(ball.eps, ball.norm, steps=20), 512, 1_000, 256),
        "standard": Tier(lambda ball: AutoAttack(ball.eps, ball.norm, "quick"), 1_000, 5_000, 1024),
        "full": Tier(lambda ball: AutoAttack(ball.eps, ball.norm), None, 50_000, 1024),
    }
)


@dataclass(frozen=True)
class Protocol:
    """What is measured of every model, by the same images, attack, sampler, starts and judge.

    Attributes:
        tier: name of the tier, see :data:`TIERS`.
        attack: what robust accuracy is taken under.
        images: number of test images to attack, drawn at random, always the same ones.  None: all.
        sampler: what draws from every model.
        samples: number of images to draw, of all classes together.
        features: the judge of the samples, as ``--features`` names it.
        detection: how outliers are told from test images.
        seed: seed of all random numbers.
    """

    tier: str
    attack: Adversary
    images: int | None
    sampler: Sampler
    samples: int
    features: str
    detection: OutOfDistribution
    seed: int = 0

    @classmethod
    def of(cls, tier: str, threat: Attack, sampler: Sampler, features: str, seed: int = 0) -> "Protocol":
        """Return the protocol of a tier for the ball of ``threat``; raise ``UserError`` for an unknown tier."""
        sizes = find_tier(tier)
        detection = OutOfDistribution((EnergyScore(),), OUTLIERS, count=sizes.outliers, eps=0.0)
        return cls(tier, sizes.attack(threat), sizes.images, sampler, sizes.samples, features, detection, seed)

    @property
    def set_name(self) -> str:
        """Name of the set of samples in each run."""
        return f"leaderboard-{self.tier}-{generate.set_name(self.sampler)}"

    def per_class(self, data: Data) -> int:
        return max(1, self.samples // len(data.classes))

    def metrics(self) -> Wanted:
        """Return what is measured of the model's predictions."""
        detection = {Key("AUROC", set=noise.name, by="energy"): self.detection for noise in OUTLIERS}
        return {**accuracy_metrics((self.attack,), self.images), **detection}

    def quality(self) -> Wanted:
        """Return what is measured of the samples."""
        return {Key("FD", samples=self.set_name, space=space_name(self.features)): SampleQuality()}

    def gradients(self, data: Data) -> tuple[int, int]:
        """Return about how many gradients of an image attacks and draws take, as if no image fell to an attack."""
        attacked = min(self.images or len(data.test), len(data.test))
        passes = sum(run.passes for run in self.attack.runs(len(data.classes)))
        return attacked * passes, self.per_class(data) * len(data.classes) * self.sampler.steps

    def describe(self) -> dict[str, Any]:
        """Return plain data, as JSON holds it."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: config.describe(v) if dataclasses.is_dataclass(v) else v for name, v in plain.items()}


def find_tier(name: str) -> Tier:
    if name not in TIERS:
        raise unknown_name("tier", name, TIERS)
    return TIERS[name]


def default_features(data: Data) -> str:
    """Return the judge that the package brings for this data, or else ``pixels``."""
    for name, folder in bundled_models().items():
        about = files.read_json(folder / "config.json")
        if "probed" in about and about["data"] == data.name:
            return name
    return "pixels"


def is_judge(run: Run, features: str) -> bool:
    """Return whether samples would be judged by the very network that they are drawn from."""
    space = find_space(features)
    return isinstance(space, ClassifierFeatures) and digest(find_model(space.where)) == digest(run.model()[0])


def measure_seconds(run: Run, protocol: Protocol, device: str) -> dict[str, Any]:
    """Return the record of how long drawing :data:`TIMED` images takes here; measured unless the run holds it."""
    about = {"sampler": config.describe(protocol.sampler), "device": describe_device(device)}
    checkpoint = run.checkpoints.path().name
    held = [r for r in run.records() if r["name"] == SECONDS and r.get("checkpoint") == checkpoint]
    if current := [r for r in held if r["settings"] == about]:
        return current[-1]
    data, sampler = run.data, protocol.sampler
    model = run.model()[0].to(device)
    y = generate.classes_to_draw(sampler, data, -(-TIMED // len(data.classes)))[:TIMED]
    view = generate.sampling_view(model, data, TIMED, "auto")
    options: dict[str, Any] = {"shape": data.shape, "view": view, "bank": sampler.bank(data)}
    start = sampler.prepare(data)
    generate.draw_chunk(model, dataclasses.replace(sampler, steps=1), start, y, 0, **options)  # what is done once only
    begin = time.perf_counter()
    generate.draw_chunk(model, sampler, start, y, 0, **options)
    seconds = time.perf_counter() - begin
    record = {"name": SECONDS, "value": seconds, "error": 0.0, "count": len(y), "settings": about, "series": {}}
    run.append([{**record, "checkpoint": checkpoint, "time": files.timestamp()}])
    return record


@dataclass
class Row:
    """What is known of one model.

    Attributes:
        model: the reference to it.
        title: its name in tables.
        why: why numbers are missing; empty if there are all.
        parameters: number of its weights.
        numbers: records by column, as far as they are there: ``clean``, ``robust``, ``FD``, ``class score``, ``AUROC``
            (the lowest over the sets of outliers) and ``seconds``.
        samples: folder of its samples.
    """

    model: str
    title: str
    why: str = ""
    parameters: int | None = None
    numbers: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    samples: Path | None = None

    def add(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Take over records that belong into a column."""
        for record in records:
            key = key_of(record)
            if key.quantity == "accuracy":
                self.numbers["clean" if key.attack is None else "robust"] = record
            elif key.quantity == "AUROC":
                self.numbers["AUROC"] = min(record, self.numbers.get("AUROC", record), key=lambda r: r["value"])
            else:
                self.numbers["seconds" if record["name"] == SECONDS else key.quantity] = record

    def describe(self) -> dict[str, Any]:
        """Return plain data, as JSON holds it."""
        fields = ("name", "value", "error", "count")
        numbers = {
            column: {name: r[name] for name in fields}
            | ({"interval": r["settings"]["interval"]} if "interval" in r["settings"] else {})
            for column, r in self.numbers.items()
        }
        about = {"model": self.model, "title": self.title, "parameters": self.parameters}
        return {**about, **({"why": self.why} if self.why else {}), "numbers": numbers}


@dataclass(frozen=True)
class Leaderboard:
    """Several models, measured by one protocol.

    Attributes:
        protocol: what was measured.
        rows: the models, those of the highest robust accuracy first.
        data: the images.
        environment: hardware, versions and date, see :func:`advebm.runs.run.environment`.
        folder: where ``leaderboard.json``, ``leaderboard.md`` and ``leaderboard.png`` are.
    """

    protocol: Protocol
    rows: list[Row]
    data: Data
    environment: Mapping[str, Any]
    folder: Path

    def __repr__(self) -> str:
        return f"Leaderboard of {', '.join(row.title for row in self.rows)}: {self.folder}"

    def _repr_html_(self) -> str:
        picture = self.folder / "leaderboard.png"
        shown = notebook.picture(picture.read_bytes(), "FD against robust accuracy") if picture.is_file() else ""
        return notebook.line(self) + notebook.table(*self.table()) + shown

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return headings and a row of texts for each model; values are given with their standard error."""
        heads = {"clean": "clean", "robust": self.protocol.attack.name, "FD": "FD", "class score": "class score"}
        heads |= {"AUROC": "AUROC", "seconds": f"s / {TIMED} drawn"}
        count = {c: next((r.numbers[c]["count"] for r in self.rows if c in r.numbers), None) for c in heads}
        columns = {c: f"{head}, n = {count[c]:,}" for c, head in heads.items() if count[c] is not None}
        columns |= {"seconds": heads["seconds"]} if count["seconds"] else {}
        lines = []
        for row in self.rows:
            cells = [_cell(row.numbers[c]) if c in row.numbers else "" for c in columns]
            few = caution(row.numbers["FD"]) if "FD" in row.numbers else ""
            weights = "" if row.parameters is None else f"{row.parameters:,}"
            lines.append([row.title, *cells, weights, "; ".join(filter(None, (row.why, few)))])
        names = ["model", *columns.values(), "parameters", "but"]
        keep = len(names) if any(line[-1] for line in lines) else -1
        return names[:keep], [line[:keep] for line in lines]

    def describe(self) -> dict[str, Any]:
        """Return plain data, as JSON holds it."""
        images = {"data": self.data.name, "train": len(self.data.train), "test": len(self.data.test)}
        about = {"protocol": self.protocol.describe(), "images": images, "environment": dict(self.environment)}
        return {**about, "rows": [row.describe() for row in self.rows]}


def most_robust_first(rows: Iterable[Row]) -> list[Row]:
    """Return rows by robust accuracy; those without one last, in the order in which they were given."""
    return sorted(rows, key=lambda row: -row.numbers["robust"]["value"] if "robust" in row.numbers else 1.0)


def _cell(record: Mapping[str, Any]) -> str:
    return f"{record['value']:.3g}" if record["name"] == SECONDS else short_text(record)
