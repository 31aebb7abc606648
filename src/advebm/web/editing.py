"""The tabs Edit and Explain: change an image by descent on the model's energy."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d

from advebm.core.errors import UserError, unknown_name
from advebm.core.rng import generator, randn
from advebm.edits import base, restore, transform
from advebm.web import views
from advebm.web.inputs import parse_integer, parse_number
from advebm.web.jobs import Job
from advebm.web.studio import Studio

STEPS = 500  # upper limit of the tabs
ANY = "none: E(x)"  # the choice without a class


class Dial(NamedTuple):
    """A slider: its label, range, step and initial value."""

    label: str
    low: float
    high: float
    step: float
    value: float


class Tool(NamedTuple):
    """An application as the page offers it.

    Attributes:
        about: instructions for the visitor.
        brush: what the brush does; empty if it is not used.
        dials: sliders of this application, at most two.
        other: second input, ``image`` (a test image) or ``class``; empty for none.
    """

    about: str
    brush: str = ""
    dials: tuple[Dial, ...] = ()
    other: str = ""


TOOLS: Mapping[str, Tool] = MappingProxyType(
    {
        "inpaint": Tool(
            "Brush over a part: it is taken away and made anew, the rest stays as it is.",
            "takes pixels away",
        ),
        "paint": Tool(
            "Paint with colours, on the picture or on an empty one: what is painted is made into the class.",
            "paints",
            (Dial("freedom: l2 radius, 0 for no limit", 0, 10, 0.1, 0),),
        ),
        "translate": Tool(
            "The picture is made into something of the class, or more like the data where there is none.",
            "",
            (Dial("how far: share of the steps", 0, 3, 0.1, 1),),
        ),
        "denoise": Tool(
            "Gaussian noise is taken out, as far as the energy sees it; where there is none some is added first.",
            "",
            (Dial("deviation of the noise", 0.01, 0.5, 0.01, 0.15), Dial("noise added first", 0, 0.5, 0.01, 0.15)),
        ),
        "upsample": Tool(
            "The picture is shrunk to means over blocks, and enlarged again: with the same means, and low energy.",
            "",
            (Dial("edge of a block, pixels", 2, 8, 1, 2),),
        ),
        "interpolate": Tool("From the picture to a test image, by way of images of low energy.", "", (), "image"),
        "compose": Tool(
            "Towards two classes at once; a weight below 0 leads away from the second.",
            "",
            (Dial("weight of the second class", -1, 1, 0.1, 1),),
            "class",
        ),
    }
)


class EditShown(NamedTuple):
    """Contents of the tab Edit."""

    begin: Image | None
    result: Image | None
    film: Image | None
    note: str


class EditForm(NamedTuple):
    """A request for an edit, with unchecked values from the page.

    Attributes:
        tool: name of the application.
        kind: name of the class, or :data:`ANY`.
        steps: number of steps.
        dials: values of the tool's dials first; further ones are ignored.
        other: number of a test image or name of a class, if the tool needs one.
        seed: seed of the noise.
    """

    tool: str
    kind: str
    steps: Any
    dials: Sequence[Any]
    other: Any
    seed: Any


def offered_tools(studio: Studio) -> list[str]:
    """Return the applications that fit the model: those with two classes need a classifier."""
    return [name for name, tool in TOOLS.items() if not (studio.critic and tool.other == "class")]


def apply_tool(studio: Studio, x: Tensor, paint: Tensor, where: Tensor, asked: EditForm, job: Job) -> EditShown:
    """Edit an image (C, H, W) that was brushed over with ``paint`` (C, H, W) where ``where`` (1, H, W) is true."""
    if asked.tool not in offered_tools(studio):
        raise unknown_name("application", asked.tool, offered_tools(studio))
    tool, steps = TOOLS[asked.tool], parse_integer(asked.steps, "the number of steps", 1, STEPS)
    values = [parse_number(v, d.label, d.low, d.high) for d, v in zip(tool.dials, asked.dials, strict=False)]
    draws = generator(parse_integer(asked.seed, "the seed", 0, 2**31), "page-edit", device=studio.device)
    y = None if studio.critic or asked.kind == ANY else torch.tensor([studio.data.number(asked.kind)])
    hole = where if tool.brush == TOOLS["inpaint"].brush else None
    image = x[None] if hole is not None else torch.where(where, paint, x)[None]
    if hole is not None and not hole.any():
        raise UserError("nothing is brushed over; brush over what is to be made anew")

    def observe(k: int, z: Tensor, value: Tensor) -> None:
        job.tell(
            EditShown(
                None,
                views.enlarge(z[0]) if len(z) == 1 else views.film_sheet(z[None]),
                None,
                f"step {k} of {steps}",
            )
        )

    options: dict[str, Any] = {"observe": observe, "frames": 9}
    with studio.search(job) as model:
        match asked.tool:
            case "inpaint":
                found = restore.Inpaint(steps)(model, image, y, hole=hole, generator=draws, **options)
            case "paint":
                free = hole_of(where)
                found = transform.Paint(steps, radius=values[0] or None)(model, image, y, hole=free, **options)
            case "translate":
                found = transform.Translate(steps, amount=values[0])(model, image, y, **options)
            case "denoise":
                noisy = (image + values[1] * randn(image, draws)).clamp(0, 1)
                found = restore.Denoise(steps, sigma=values[0])(model, noisy, y, **options)
            case "upsample":
                factor = int(values[0])
                if image.shape[2] % factor or image.shape[3] % factor:
                    raise UserError(
                        f"blocks of {factor} pixels do not fill an image of {image.shape[3]}; choose another"
                    )
                found = restore.Upsample(steps, factor=factor)(model, avg_pool2d(image, factor), y, **options)
            case "interpolate":
                ends = torch.cat([image, studio.image(asked.other)[0][None]])
                found = transform.Interpolate(steps)(model, ends, None, observe=observe, frames=4)
            case "compose":
                if y is None:
                    raise UserError("a composition takes two classes; choose the first, too")
                both, weights = [int(y), studio.data.number(asked.other)], (1.0, values[0])
                found = transform.Compose(steps, weights=weights)([model, model], image, both, **options)
    if asked.tool == "interpolate":
        ways = found.film.transpose(0, 1)  # one row per frame
        return EditShown(
            views.film_sheet(found.begin[None]),
            views.film_sheet(found.x[None]),
            views.film_sheet(ways),
            note(found),
        )
    return EditShown(
        views.enlarge(found.begin[0]), views.enlarge(found.x[0]), views.film_sheet(found.film), note(found)
    )


def hole_of(where: Tensor) -> Tensor | None:
    """Return the mask; None if it is empty or covers the whole image."""
    return where if where.any() and not where.all() else None


def note(found: base.Edited) -> str:
    """Return the numbers of an edit, averaged over its images, as text."""
    n = {name: values.mean().item() for name, values in found.numbers.items()}
    parts = [f"energy {n['energy before']:.3g} → {n['energy after']:.3g} nats", f"l2 change {n['distance']:.2f}"]
    if "confidence after" in n:
        parts.append(
            f"probability of the class {100 * n['confidence before']:.0f} → {100 * n['confidence after']:.0f} %"
        )
    return ", ".join(parts)


class Explained(NamedTuple):
    """A counterfactual: frames (F, C, H, W) on the way from an image to it, and numbers (F,) for each frame."""

    film: Tensor
    series: dict[str, Tensor]
    names: tuple[str, str]
    reached: bool
    note: str


def explain(studio: Studio, x: Tensor, target: str, level: Any, steps: Any, job: Job) -> Explained:
    """Find the nearest image that the model takes for ``target`` with probability ``level``, and the way to it."""
    if studio.critic:
        raise UserError("a counterfactual takes a classifier; this model is a critic and has no classes")
    edit_ = transform.Counterfactual(
        parse_integer(steps, "the number of steps", 1, STEPS),
        level=parse_number(level, "the probability to reach", 0.01, 0.99),
    )
    total, done = edit_.searches * edit_.steps, 0

    def observe(k: int, z: Tensor, value: Tensor) -> None:
        nonlocal done
        done += 1
        if done % 10 == 0:
            job.tell(f"step {done} of about {total}")

    y = torch.tensor([studio.data.number(target)])
    with studio.search(job) as model:
        found = edit_(model, x[None], y, observe=observe, frames=21)
    n = {name: float(values[0]) for name, values in found.numbers.items()}
    old = studio.name(int(n["from"]))
    reached = n["reached"] > 0
    says = f"**{target}** has probability {100 * n['confidence after']:.0f} % at an l2 distance of {n['distance']:.2f}"
    if int(n["from"]) == int(n["to"]):
        text = f"The model takes the image for {old} already; choose another class."
    else:
        text = f"{says}; the image is taken for {old}." if reached else f"Not reached within the largest ball: {says}."
    return Explained(found.film[0], {k: v[0] for k, v in found.series.items()}, (old, target), reached, text)


def moment(found: Explained, share: Any) -> tuple[Image, Image, str]:
    """Return the image at ``share`` percent of the way, its change so far, and the model's outputs as text."""
    k = round(parse_number(share, "the place on the way, in percent", 0, 100) / 100 * (len(found.film) - 1))
    added, factor = views.difference(found.film[0], found.film[k])
    old, new = (100 * found.series[s][k].item() for s in ("confidence in the old class", "confidence"))
    says = f"probability of {found.names[0]}: {old:.0f} %, of {found.names[1]}: {new:.0f} %"
    return (
        views.enlarge(found.film[k]),
        added,
        f"{says}; l2 distance {found.series['distance'][k]:.2f}, shown x {factor:.1f}",
    )


def way(found: Explained) -> Image:
    """Plot the probabilities of the old and the new class along the way."""
    with views.figure() as (drawn, (axis,)):
        distance = found.series["distance"]
        for name, label in zip(("confidence in the old class", "confidence"), found.names, strict=True):
            axis.plot(distance, found.series[name], label=label)
        axis.set(xlabel="l2 distance from the image", ylabel="probability", ylim=(0, 1.02), title="along the way")
        axis.legend(frameon=False)
        return views.to_picture(drawn)
