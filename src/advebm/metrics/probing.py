"""Evaluation of frozen features: linear classifiers on them, and nearest neighbours among them."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.utils import skip_init

from advebm.attacks.base import Adversary
from advebm.attacks.projected import Attack
from advebm.core import config
from advebm.core.errors import UserError
from advebm.data.sources import Images
from advebm.metrics.base import Features, Record, Subject, proportion
from advebm.metrics.robustness import attack_split
from advebm.models.batching import device_of
from advebm.models.modes import fix_branch, searching, using
from advebm.models.network import Network


def representations(model: nn.Module, x: Tensor, batch: int = 500) -> Tensor:
    """Return the inputs (N, W) of a network's head for images (N, C, H, W), uint8 or floating point; on the CPU.

    Raises:
        UserError: the model is not a :class:`Network` with a head, so it has no features to read.
    """
    with searching(model):
        return Features("", _require_head(model).features).of(x, device_of(model), batch)


def through(branch: str) -> str:
    """Return the part of a record's name that names the batch-norm branch; empty for ``clean``."""
    return "" if branch == "clean" else f" on the {branch} branch"


def _require_head(model: nn.Module) -> Network:
    if not isinstance(model, Network) or isinstance(model.head, nn.Identity):
        raise UserError("a probe reads the features before a network's head, and the model returns logits only")
    return model


@dataclass(frozen=True)
class Probe:
    """Multinomial logistic regression by scikit-learn on standardised features, converted to a linear layer.

    Attributes:
        c: scikit-learn's C, the inverse weight of the l2 penalty on the weights of the standardised features.
        iterations: maximum number of L-BFGS iterations.
        branch: which branch of dual batch norms (as in ACL) to use, that of ``clean`` or of ``adversarial`` images.
    """

    c: float = 1.0
    iterations: int = 1000
    branch: Literal["clean", "adversarial"] = "clean"

    def __post_init__(self) -> None:
        config.check_choices(self)
        if not self.c > 0 or self.iterations < 1:
            raise UserError(f"c must be > 0 and iterations at least 1, got {self.c} and {self.iterations}")

    @property
    def name(self) -> str:
        """``a linear probe`` and all non-default settings, so that records of different probes have different names."""
        return "a linear probe" + (f" with C {self.c:g}" if self.c != 1 else "") + through(self.branch)

    def fit(self, z: Tensor, y: Tensor, classes: int) -> nn.Linear:
        """Fit a layer, W -> ``classes`` logits, to features ``z`` (N, W) of images with labels ``y`` (N,).

        Raises:
            UserError: a class has no images.
        """
        from sklearn.linear_model import LogisticRegression  # a second to import
        from sklearn.preprocessing import StandardScaler

        if missing := sorted(set(range(classes)) - set(y.tolist())):
            raise UserError(f"a probe is fitted on images of every class, and class {missing[0]} has none")
        rows = z.double().numpy()
        scaler = StandardScaler().fit(rows)
        regression = LogisticRegression(C=self.c, max_iter=self.iterations).fit(scaler.transform(rows), y.numpy())
        weight, bias = (torch.from_numpy(part) for part in (regression.coef_, regression.intercept_))
        if classes == 2:  # scikit-learn returns only the difference of the two logits
            weight, bias = torch.cat([-weight / 2, weight / 2]), torch.cat([-bias / 2, bias / 2])
        mean, scale = torch.from_numpy(scaler.mean_), torch.from_numpy(scaler.scale_)
        layer = skip_init(nn.Linear, z.shape[1], classes)
        with torch.no_grad():
            layer.weight.copy_(weight / scale)
            layer.bias.copy_(bias - weight @ (mean / scale))
        return layer

    def classifier(self, model: nn.Module, split: Images, classes: int, batch: int = 500) -> Network:
        """Return a copy of the network, fixed to ``branch``, whose head is a probe fitted to a split; in eval mode."""
        network = fix_branch(_require_head(model), self.branch)
        layer = self.fit(representations(network, split.x, batch), split.y, classes)
        return Network(network.normalise, network.backbone, layer.to(device_of(model))).eval()


@dataclass(frozen=True)
class LinearProbe:
    """Accuracy of a linear classifier on frozen features, fitted on clean training images, clean and under attack.

    The attack uses gradients through both the classifier and the network.  Jiang et al. (2020) call this standard
    linear fine-tuning.

    Attributes:
        probe: how the classifier is fitted.
        attack: the attack.  None: the recipe's ``threat``.
    """

    probe: Probe = Probe()
    attack: Adversary | None = None

    encoders: ClassVar[bool] = True
    cites: ClassVar[tuple[str, ...]] = ("jiang2020", "pedregosa2011")

    def __call__(self, subject: Subject, generator: torch.Generator) -> list[Record]:
        """Return two records, ``accuracy of`` :attr:`Probe.name`, clean and under the attack."""
        subject.check_labelled()
        data, attack = subject.data, self.attack or subject.threat
        model = self.probe.classifier(subject.model, data.train, len(data.classes), subject.batch)
        settings = {"metric": config.describe(self)}
        probed, name = subject._replace(model=model), f"accuracy of {self.probe.name}"
        clean = attack_split(probed, Attack(eps=0.0), generator).standing()
        attacked = attack_split(probed, attack, generator).standing()
        records = [Record(name, *proportion(clean), settings)]
        settings = {**settings, "attack": config.describe(attack)}
        return [*records, Record(f"{name} under {attack.name}", *proportion(attacked), settings)]


@dataclass(frozen=True)
class NearestNeighbours:
    """Accuracy of the vote of the nearest training images, by the cosine of frozen features.

    Attributes:
        k: number of neighbours, with one vote each.
        branch: branch of dual batch norms, as for :class:`Probe`.
    """

    k: int = 20
    branch: Literal["clean", "adversarial"] = "clean"

    encoders: ClassVar[bool] = True
    cites: ClassVar[tuple[str, ...]] = ("wu2018", "pedregosa2011")

    def __post_init__(self) -> None:
        config.check_choices(self)
        if self.k < 1:
            raise UserError(f"k must be at least 1, got {self.k}")

    def __call__(self, subject: Subject, generator: torch.Generator) -> list[Record]:
        from sklearn.neighbors import KNeighborsClassifier  # a second to import

        subject.check_labelled()
        train = subject.data.train
        if self.k > len(train):
            raise UserError(f"{self.k} neighbours are asked of {len(train)} training images; lower k")
        with using(subject.model, self.branch):
            near, z = (normalize(representations(subject.model, x, subject.batch)) for x in (train.x, subject.split.x))
        predicted = KNeighborsClassifier(self.k).fit(near.numpy(), train.y.numpy()).predict(z.numpy())
        settings = {"metric": config.describe(self)}
        hits = torch.from_numpy(predicted) == subject.split.y
        name = f"accuracy of {self.k} nearest neighbours{through(self.branch)}"
        return [Record(name, *proportion(hits), settings)]
