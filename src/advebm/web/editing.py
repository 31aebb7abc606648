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
from advebm.sampling.generate import to_bytes
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
            "What is brushed over is taken away and made anew; the rest stays as it is.", "takes pixels away"
        ),
        "paint": Tool(
            "Paint with colours, on the picture or on an empty one: what is painted is made to look like the class.",
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


def apply_tool(studio: Studio, x: Tensor, paint: Tensor, where: Tensor, form: EditForm, job: Job) -> EditShown:
    """Edit an image (C, H, W) that was brushed over with ``paint`` (C, H, W) where ``where`` (1, H, W) is true."""
    if form.tool not in offered_tools(studio):
        raise unknown_name("application", form.tool, offered_tools(studio))
    tool, steps = TOOLS[form.tool], parse_integer(form.steps, "the number of steps", 1, STEPS)
    values = [parse_number(v, d.label, d.low, d.high) for d, v in zip(tool.dials, form.dials, strict=False)]
    draws = generator(parse_integer(form.seed, "the seed", 0, 2**31), "page-edit", device=studio.device)
    y = None if studio.critic or form.kind == ANY else torch.tensor([studio.data.number(form.kind)])
    mask = where if tool.brush == TOOLS["inpaint"].brush else None
    image = torch.where(where, paint, x)[None] if tool.brush == TOOLS["paint"].brush else x[None]
    if mask is not None and not mask.any():
        raise UserError("nothing is brushed over; brush over what is to be made anew")

    def observe(k: int, z: Tensor, value: Tensor) -> None:
        picture = views.enlarge(z[0]) if len(z) == 1 else views.film_sheet(z[None])
        job.tell(EditShown(picture, None, f"step {k} of {steps}"))

    options: dict[str, Any] = {"observe": observe, "frames": 9}
    with studio.search(job) as model:
        match form.tool:
            case "inpaint":
                edited = restore.Inpaint(steps)(model, image, y, hole=mask, generator=draws, **options)
            case "paint":
                painted = where if where.any() and not where.all() else None  # None: the whole image
                edited = transform.Paint(steps, radius=values[0] or None)(model, image, y, hole=painted, **options)
            case "translate":
                edited = transform.Translate(steps, amount=values[0])(model, image, y, **options)
            case "denoise":
                noisy = (image + values[1] * randn(image, draws)).clamp(0, 1)
                edited = restore.Denoise(steps, sigma=values[0])(model, noisy, y, **options)
            case "upsample":
                factor = int(values[0])
                height, width = image.shape[2:]
                if height % factor or width % factor:
                    raise UserError(f"blocks of {factor} pixels do not fill an image of {width}; choose another")
                edited = restore.Upsample(steps, factor=factor)(model, avg_pool2d(image, factor), y, **options)
            case "interpolate":
                ends = torch.cat([image, studio.image(form.other)[0][None]])
                edited = transform.Interpolate(steps)(model, ends, None, observe=observe, frames=4)
            case "compose":
                if y is None:
                    raise UserError("a composition takes two classes; choose the first, too")
                classes, weights = [int(y), studio.data.number(form.other)], (1.0, values[0])
                edited = transform.Compose(steps, weights=weights)([model, model], image, classes, **options)
    if form.tool == "interpolate":
        result = views.film_sheet(edited.x[None])
        film = edited.film.transpose(0, 1)  # one row per frame
    else:
        result, film = views.enlarge(edited.x[0]), edited.film
    return EditShown(result, views.film_sheet(film), note(edited))


def note(edited: base.Edited) -> str:
    """Return the numbers of an edit, averaged over its images, as text; if no pixel changed, that comes first."""
    means = {name: values.mean().item() for name, values in edited.numbers.items()}
    parts = [f"energy {views.short(means['energy before'])} → {views.short(means['energy after'])} nats"]
    parts.append(f"l2 change {means['distance']:.2f}")
    if "confidence after" in means:
        before, after = 100 * means["confidence before"], 100 * means["confidence after"]
        parts.append(f"probability of the class {before:.0f} → {after:.0f} %")
    if torch.equal(to_bytes(edited.begin), to_bytes(edited.x)):
        return f"**Nothing changed.** Take more steps, or choose another class. ({', '.join(parts)})"
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
    counterfactual = transform.Counterfactual(
        parse_integer(steps, "the number of steps", 1, STEPS),
        level=parse_number(level, "the probability to reach", 0.01, 0.99),
    )
    total, done = counterfactual.searches * counterfactual.steps, 0

    def observe(k: int, z: Tensor, value: Tensor) -> None:
        nonlocal done
        done += 1
        if done % 10 == 0:
            job.tell(f"step {done} of about {total}")

    y = torch.tensor([studio.data.number(target)])
    with studio.search(job) as model:
        edited = counterfactual(model, x[None], y, observe=observe, frames=21)
    numbers = {name: float(values[0]) for name, values in edited.numbers.items()}
    old, reached = studio.name(int(numbers["from"])), numbers["reached"] > 0
    text = f"The model takes the image for **{old}**."
    outcome = f"probability {100 * numbers['confidence after']:.0f} % at an l2 distance of {numbers['distance']:.2f}"
    if numbers["from"] == numbers["to"]:
        text += " Choose another class."
    else:
        text += (
            f" **{target}** has {outcome}." if reached else f" Not reached: {target} has {outcome}, the largest tried."
        )
    return Explained(edited.film[0], {k: v[0] for k, v in edited.series.items()}, (old, target), reached, text)


def moment(explained: Explained, share: Any) -> tuple[Image, Image, str]:
    """Return the image at ``share`` percent of the way, its change so far, and the model's outputs as text."""
    k = round(parse_number(share, "the place on the way, in percent", 0, 100) / 100 * (len(explained.film) - 1))
    added, factor = views.difference(explained.film[0], explained.film[k])
    old, new = (100 * explained.series[s][k].item() for s in ("confidence in the old class", "confidence"))
    probabilities = f"probability of {explained.names[0]}: {old:.0f} %, of {explained.names[1]}: {new:.0f} %"
    text = f"{probabilities}; l2 distance {explained.series['distance'][k]:.2f}, shown x {factor:.1f}"
    return views.enlarge(explained.film[k]), added, text


def way(explained: Explained) -> Image:
    """Plot the probabilities of the old and the new class along the way."""
    with views.figure() as (figure, axis):
        distance = explained.series["distance"]
        for name, label in zip(("confidence in the old class", "confidence"), explained.names, strict=True):
            axis.plot(distance, explained.series[name], label=label)
        axis.set(xlabel="l2 distance from the image", ylabel="probability", ylim=(0, 1.02), title="along the way")
        axis.legend(frameon=False)
        return views.to_picture(figure)
