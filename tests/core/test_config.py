import dataclasses
import re
import textwrap
from pathlib import Path
from typing import ClassVar

import pytest
import yaml

from advebm import recipes
from advebm.attacks.projected import Attack
from advebm.core import config
from advebm.core.errors import UserError
from advebm.data.negatives import GaussianImages
from advebm.objectives.at import AT
from advebm.runs.recipe import Recipe, dump, resolve
from advebm.samplers.classifier import CS, TA
from tests.helpers import default

EVERY_KIND = [(role, kind) for role, kinds in config.KINDS.items() for kind in kinds]


@pytest.mark.parametrize(("role", "kind"), EVERY_KIND)
def test_build_and_describe_are_inverse_for_every_default(role, kind):
    thing = default(role, kind)
    plain = config.describe(thing)
    assert plain["kind"] == kind
    assert config.build(plain, role) == thing
    assert config.build(yaml.safe_load(yaml.safe_dump(plain)), role) == thing
    assert thing.__doc__


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_survives_a_round_trip(name):
    recipe = resolve(recipes.find(name))
    assert recipe.name == name
    assert recipes.header(name)[0]
    assert resolve(yaml.safe_load(dump(recipe))) == recipe


def test_every_option_of_a_recipe_can_be_overridden_with_its_own_value():
    """Whatever describe shows can be said on the command line, as text."""
    recipe = resolve(recipes.find("digits-at"))

    def leaves(plain, path=""):
        items = plain.items() if isinstance(plain, dict) else enumerate(plain)
        for key, value in items:
            if isinstance(value, dict) or (isinstance(value, list) and value and isinstance(value[0], dict)):
                yield from leaves(value, f"{path}{key}.")
            elif key != "kind":
                yield f"{path}{key}", value

    pairs = [
        (path, ",".join(map(str, v)) if isinstance(v, list) else str(v)) for path, v in leaves(config.describe(recipe))
    ]
    assert len(pairs) > 40
    assert resolve(recipes.find("digits-at"), pairs) == recipe


def test_values_are_converted_as_annotated():
    attack = config.construct(Attack, {"eps": "8/255", "steps": "20", "step_size": "none", "norm": "l2"})
    assert attack == Attack(eps=8 / 255, steps=20, step_size=None, norm="l2")
    assert config.construct(Attack, {"step_size": "2.5/255"}).step_size == 2.5 / 255
    assert config.construct(Attack, {"eps": 1, "steps": 1e1}) == Attack(eps=1.0, steps=10)
    adam = config.build({"kind": "adam", "lr": "1e-4", "betas": "0,0.99"}, "optimizer")
    assert adam.lr == 1e-4
    assert adam.betas == (0.0, 0.99)
    assert config.build({"kind": "sgd", "nesterov": "false"}, "optimizer").nesterov is False


def test_overrides_reach_what_the_recipe_left_at_its_default():
    recipe = resolve(recipes.find("digits-at"), [("objective.attack.restarts", "2"), ("metrics.2.factors", "0.5, 1")])
    assert recipe.objective.attack.restarts == 2
    assert recipe.objective.attack.eps == 0.9
    assert recipe.metrics[2].factors == (0.5, 1.0)


def test_another_kind_keeps_the_options_both_have():
    base = recipes.find("digits-at")
    assert resolve(base, [("sampler.kind", "ta")]).sampler == TA(steps=25, step_size=0.1)
    changed = resolve(base, [("sampler.steps", "7"), ("sampler", "cs")])  # kinds first, wherever they stand
    assert changed.sampler == CS(steps=7, step_size=0.1)
    assert resolve(base, [("objective", "noise"), ("objective.std", "0.2")]).objective.std == 0.2


def test_options_of_the_objective_say_which_images_it_needs():
    pairs = [("outside", "gaussians"), ("outside.source", "digits"), ("objective.negatives.start", "outside")]
    recipe = resolve(recipes.find("digits-jem"), [*pairs, ("objective.negatives.limit", "0.5")])
    assert (recipe.objective.negatives.start, recipe.objective.negatives.limit) == ("outside", 0.5)
    assert recipe.outside == GaussianImages()
    with pytest.raises(UserError, match="objective JEM needs outside images; give them with --outside KIND"):
        resolve(recipes.find("digits-jem"), pairs[2:])
    with pytest.raises(UserError, match=r"no option --objective\.negatives\.sart"):
        resolve(recipes.find("digits-jem"), [("objective.negatives.sart", "outside")])


def test_recipes_in_the_docs_can_be_built():
    texts = [path.read_text() for path in (Path(__file__).parents[2] / "docs").glob("*.md")]
    blocks = [textwrap.dedent(b) for text in texts for b in re.findall(r"^ *```yaml\n(.*?)^ *```", text, re.M | re.S)]
    plain = [block for text in blocks if isinstance(block := yaml.safe_load(text), dict) and "base" in block]
    built = {block["name"]: resolve(recipes.complete(block)) for block in plain}
    assert built["cifar10-sada-jem"].objective.needs == {"labels", "view", "outside"}


def test_public_weights_classes_are_named_by_module_and_kept(monkeypatch):
    plain = {"kind": "tests.core.test_config:Foreign", "width": "3"}
    thing = config.build(plain, "objective")
    assert thing == Foreign(width=3)
    recipe = dataclasses.replace(resolve(recipes.find("digits-at")), objective=thing)
    assert resolve(yaml.safe_load(dump(recipe))) == recipe
    with pytest.raises(UserError, match="foreign code"):
        config.build(plain, "objective", foreign=False)


@dataclasses.dataclass(frozen=True)
class Foreign:
    width: int = 1
    needs: ClassVar[frozenset[str]] = frozenset()
    outputs: ClassVar[int | None] = None
    hidden: ClassVar[int | None] = None


MISTAKES = [
    ([("objective.attack.epz", "0.1")], r"'epz' is unknown \(did you mean 'eps'\?\); there is eps, norm"),
    (
        [("objective.attack.eps", "eight")],
        "recipe.objective.attack.eps takes a number or a fraction such as 8/255, got 'eight'",
    ),
    ([("objective.attack.eps", "-1")], "recipe.objective.attack: eps is a radius >= 0"),
    ([("objective.attack.norm", "l3")], "is one of linf, l2, got 'l3'"),
    ([("objective.attack.steps", "1.5")], "takes a whole number, got '1.5'"),
    ([("objective.kind", "trade")], "no objective 'trade'"),
    ([("objective.kind", "att")], "did you mean 'at'"),
    ([("objective.kind", "no.such:Thing")], "cannot be imported"),
    ([("objective.kind", "math:pi")], "not a dataclass"),
    ([("train.imagse", "1")], "did you mean 'images'"),
    ([("metrics.9.noise", "5")], "not an item of a list of 5"),
    ([("seed.x", "5")], "nothing below 0"),
    ([("optimizer.nesterov", "perhaps")], "is true or false"),
    ([("metrics.2.factors", "a,b")], "takes a number"),
    ([("train.images", "none")], "may not be empty|takes a whole number"),
    ([("train.batch", "10"), ("train.streams", "3")], "cannot be cut into 3 equal streams"),
    ([("objective.attack", "5")], "takes a block of options, got '5'"),
]


@pytest.mark.parametrize(("overrides", "message"), MISTAKES, ids=lambda v: str(v)[:40])
def test_mistakes_are_named(overrides, message):
    with pytest.raises(UserError, match=message):
        resolve(recipes.find("digits-at"), overrides)


def test_missing_and_unknown_blocks_are_named():
    plain = recipes.find("digits-at")
    with pytest.raises(UserError, match="recipe needs 'data'"):
        resolve({k: v for k, v in plain.items() if k != "data"})
    with pytest.raises(UserError, match="recipe has no option 'dta'"):
        resolve({**plain, "dta": {}})
    with pytest.raises(UserError, match="objective has no kind; there is acl, adversarial-infonce, at, awp, binary-at"):
        resolve({**plain, "objective": {}})
    with pytest.raises(UserError, match="takes a block of options with a kind, got 5"):
        config.build(5, "objective")
    with pytest.raises(UserError, match="did you mean 'digits-at'"):
        recipes.find("digit-at")


def test_every_kind_points_at_a_frozen_dataclass():
    for role, kind in EVERY_KIND:
        cls = config.lookup(role, kind)
        assert dataclasses.is_dataclass(cls)
        assert cls.__dataclass_params__.frozen


def test_a_recipe_is_plain_data():
    hash(resolve(recipes.find("digits-at")))
    assert {f.name for f in dataclasses.fields(Recipe)} >= {
        "data",
        "backbone",
        "objective",
        "threat",
        "sampler",
        "metrics",
    }
    assert AT() == AT()
