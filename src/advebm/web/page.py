"""The page: its components and the functions they call, which are in the other modules of this package."""

import functools
import html
import math
from abc import ABCMeta
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
import torch
from gradio.components.base import server
from PIL import Image, ImageDraw
from torch import Tensor

from advebm.core import config
from advebm.core.errors import UserError, unknown_name
from advebm.toy import densities
from advebm.toy import train as toy_training
from advebm.web import attacking, editing, inputs, listing, planes, sampling, slicing, views
from advebm.web.jobs import Job, Jobs, Stopped
from advebm.web.studio import EVERY, Studio

CSS = (
    """
.gradio-container { width: 100%; max-width: 1280px !important; margin: 0 auto; }
.sight { padding-top: 34px !important; }
.sight .icon-button-wrapper { transform: translateY(-34px); }
.pixels img { image-rendering: pixelated; }
.note .error, .note .clear-status { display: none; }
.title { flex-grow: 0 !important; min-width: 130px !important; }
.about p { opacity: 0.7; margin: 0; }
.html-container { padding: 0 !important; }
.controls { align-items: flex-end; }
.form:has(.model) { max-width: 420px; }
.controls > button { flex: 0 0 auto !important; height: 42px; min-width: 110px !important; white-space: nowrap; }
@media (max-width: 640px) {
  .controls > button { flex-grow: 1 !important; }
  .pictures > * { flex: 0 0 calc(50% - 8px) !important; min-width: 0 !important; }
}
.tabitem { padding-left: 0 !important; padding-right: 0 !important; }
footer { display: none !important; }
iframe.report { width: 100%; height: 80vh; border: 1px solid var(--border-color-primary); }
"""
    + views.CSS
)
FONTS: dict[str, Any] = {"font": ("system-ui", "sans-serif"), "font_mono": ("ui-monospace", "monospace")}
THEME = gr.themes.Default(primary_hue="blue", **FONTS)  # with fonts of the visitor's system, none from other servers
CANVAS = 320
RED = "#ff2d2d"  # what is brushed before anybody brushes
METHODS = {  # samplers in words; others are shown by their names
    "ta": "TA: raises p(y|x)",
    "cs": "CS: lowers E(x, y)",
    "rcs": "RCS: lowers E(x, y) + E(x)",
    "langevin": "Langevin: lowers E(x), with noise",
    "jeat-16": "JEAT 16: Langevin dynamics on E(y|x)",
    "jeat-17": "JEAT 17: Langevin dynamics on E(x, y)",
    "sgld": "SGLD: lowers E(x) from noise, as JEM",
    "ascent": "Ascent: lowers E(x)",
}
STARTS = {
    "class": "a Gaussian for each class",
    "global": "one Gaussian for all images",
    "noise": "uniform noise",
    "outside": "outside images",
    "buffer": "the replay buffer",
}
UNTIL_SHOWN = (gr.Image, gr.Slider, gr.DownloadButton)  # as results these are hidden until they come
MAX_STROKES = 32  # limit of stored brush strokes that wait to be used
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}  # options of events


class Given(NamedTuple):
    """A picture that a visitor chose: an image (C, H, W), its label or -1, and a description.

    Attributes:
        brought: whether it is the visitor's own, rather than a test image.
    """

    x: Tensor
    label: int
    said: str
    brought: bool = False


class Finished(NamedTuple):
    """What a job returned, other than what it reports on the way; None: there is nothing to show."""

    result: Any


class Chooser(NamedTuple):
    """Components to choose a picture with, and the place of the first one among the studio's examples."""

    place: int
    image: gr.State
    number: gr.Number
    upload: gr.UploadButton
    said: gr.Markdown


def show_user_errors(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function so that a UserError becomes a message on the page."""

    @functools.wraps(function)
    def call(*values: Any) -> Any:
        try:
            return function(*values)
        except UserError as error:
            raise message(error) from None

    return call


def message(error: Exception) -> gr.Error:
    """Return a message for the visitor, escaped so that it is not read as markup."""
    return gr.Error(html.escape(str(error)), print_exception=False, title="That does not work")


class Bounded:
    """Mixin for Gradio's image editor that decodes only the brushed layers and stores nothing large."""

    blob_storage: dict[str, Any]

    @server
    def accept_blobs(self, data: Any) -> None:
        """Store a part of the brush strokes, which the browser sends before the request; ignore oversized ones."""
        if len(str(data.data["index"])) > 4 or any(len(content) > inputs.MAX_LAYER_BYTES for _, content in data.files):
            return
        super().accept_blobs(data)  # type: ignore[misc]
        for key in list(self.blob_storage)[:-MAX_STROKES]:
            self.blob_storage.pop(key, None)

    @show_user_errors
    def preprocess(self, payload: Any) -> dict[str, Any]:
        """Return the decoded brushed layers under the key ``layers``."""
        strokes = self.blob_storage.pop(payload.id, None) if payload and payload.id is not None else payload
        parts = [part for part in (strokes.layers or [] if strokes else []) if part is not None]
        return {"layers": inputs.read_layers([part if isinstance(part, bytes) else Path(part.path) for part in parts])}


# Gradio's own metaclass would write an interface file next to this one.
Canvas = ABCMeta.__new__(type(gr.ImageEditor), "ImageEditor", (Bounded, gr.ImageEditor), {})


def image_view(label: str, *, name: str | None = None, kind: str = "pixels", value: Any = None) -> gr.Image:
    """Return a component that shows a picture: ``pixels`` as squares, or a ``figure``; hidden without one."""
    return gr.Image(
        value,
        label=label,
        type="pil",
        format="png",
        interactive=False,
        buttons=["download", "fullscreen"],
        alt_text=label,
        elem_id=name,
        elem_classes=["sight", kind],
        visible=value is not None,
        min_width=100 if kind == "pixels" else 280,
    )


def seed_field() -> gr.Number:
    return gr.Number(0, label="seed of the random numbers", precision=0, minimum=0, min_width=140)


def buttons(label: str, name: str) -> tuple[gr.Button, gr.Button]:
    """Return a start button, and a stop button that is shown while the work runs."""
    go = gr.Button(label, variant="primary", elem_id=name, min_width=80)
    return go, gr.Button("Stop", variant="stop", elem_id=f"{name}-stop", min_width=80, visible=False)


class Page:
    """The page for some runs.

    Attributes:
        studios: loaded runs by title.
        folder: where the page writes its own files.
        jobs: running jobs.
    """

    def __init__(self, studios: Mapping[str, Studio], folder: Path) -> None:
        self.studios, self.folder, self.jobs = dict(studios), folder, Jobs()
        self._updates: list[tuple[Any, Callable[[Studio], Any]]] = []  # components that another model updates
        self._outputs: list[Any] = []  # components that show results of the model
        self._first: list[Callable[[Any], None]] = []  # take the event at which something is shown without being asked

    def studio(self, title: str) -> Studio:
        if title not in self.studios:
            raise unknown_name("run", title, self.studios)
        return self.studios[title]

    # Events ---------------------------------------------------------------------------------------------------------

    def at_work(
        self,
        go: gr.Button,
        stop: gr.Button,
        work: Callable[..., Any],
        taken: Sequence[Any],
        shown: Sequence[Any],
        *,
        show: Callable[[Any], Sequence[Any]] = lambda news: news,
    ) -> Callable[[Callable[..., Any], Callable[..., Any]], None]:
        """Call ``work(job, *values)`` when the button ``go`` is pressed; until it ends, show the button ``stop``.

        Values of the components ``taken`` are passed on.  Reports and results go through ``show`` to the components
        ``shown``, of which the last is a note.  If the model is among ``taken``, choosing another one clears ``shown``.

        Returns:
            A function that takes another event, such as ``tab.select``, and what to call at it, of the same form as
            ``work``.
        """
        busy = [gr.update(interactive=False), gr.update(visible=True)]
        idle = [gr.update(interactive=True), gr.update(visible=False)]
        unchanged = [gr.skip()] * (len(shown) - 1)

        def contents(news: Any) -> list[Any]:
            if news is None:
                return [*unchanged, gr.skip()]
            if isinstance(news, str):
                return [*unchanged, news]
            return [present(component, value) for component, value in zip(shown, show(news), strict=True)]

        def runner(work: Callable[..., Any], *, at_once: bool) -> Callable[..., Any]:
            def run(request: gr.Request, *values: Any) -> Iterator[Any]:
                try:
                    with self.jobs.begin(str(request.session_hash)) as job:
                        if at_once:
                            yield [*unchanged, gr.skip(), *busy]
                        for news in job.follow(lambda job: Finished(work(job, *values))):
                            if isinstance(news, Finished):
                                yield [*contents(news.result), *idle]
                            else:
                                yield [*contents(news), *busy]
                except Stopped:
                    yield [*unchanged, "stopped", *idle]
                except UserError as error:
                    yield [*unchanged, html.escape(str(error)), *idle]
                    raise message(error) from None
                except Exception:
                    yield [*unchanged, "This went wrong on the server, whose log says how.", *idle]
                    raise

            return run

        note = shown[-1]
        note.elem_classes = ["note"]  # it shows errors itself, so Gradio's error sign is hidden
        options: Any = {"inputs": taken, "outputs": [*shown, go, stop], "api_visibility": "private"}
        options |= {"show_progress": "minimal", "show_progress_on": note}
        go.click(runner(work, at_once=True), **options)
        self._outputs += shown if self.model in taken else []
        stop.click(self.leave, queue=False, **QUIET)
        return lambda event, work: event(runner(work, at_once=False), **options)

    def depends(self, component: Any, update: Callable[..., Any]) -> Any:
        """Register how a component is updated for another model, and return the component."""
        self._updates.append((component, update))
        return component

    # Parts ----------------------------------------------------------------------------------------------------------

    def build(self) -> gr.Blocks:
        first = next(iter(self.studios.values()))
        with gr.Blocks(title="advebm", analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
            with gr.Row(equal_height=True):
                gr.Markdown("# advebm", elem_classes="title")
                self.model = gr.Dropdown(
                    list(self.studios),
                    value=first.title,
                    label="model",
                    visible=len(self.studios) > 1,
                    elem_classes="model",
                )
            self.depends(gr.Markdown(first.about(), elem_classes="about"), Studio.about)
            for name, part in (
                ("Draw", self.draw_tab),
                ("Edit", self.edit_tab),
                ("Explain", self.explain_tab),
                ("Robustness", self.robustness_tab),
                ("Landscape", self.landscape_tab),
                ("Runs", self.runs_tab),
                ("Toy", self.toy_tab),
            ):
                with gr.Tab(name, id=name.lower()) as tab:
                    part(first, tab)
            updated = [component for component, _ in self._updates]
            for component in self._outputs:
                if component not in updated:
                    self.depends(component, clear_component(component))
            components, updates = zip(*self._updates, strict=True)

            @show_user_errors
            def turn(title: str, request: gr.Request) -> list[Any]:
                studio = self.studio(title)
                self.leave(request)
                return [update(studio) for update in updates]

            for show_first in self._first:
                show_first(blocks.load)
            turned = self.model.change(turn, self.model, list(components), **QUIET)
            for show_first in self._first:
                show_first(turned.then)
            blocks.unload(self.leave)
        return blocks

    def leave(self, request: gr.Request) -> None:
        """Stop all jobs of a visitor who left, pressed Stop or chose another model."""
        self.jobs.stop(str(request.session_hash))

    def classes(
        self,
        studio: Studio,
        label: str = "class",
        *,
        before: Sequence[str] = (),
        default: Callable[[Studio], str] | None = None,
        hidden: bool = False,
    ) -> gr.Dropdown:
        """Return a choice of ``before`` and the classes; for a critic it is hidden and has only ``before``."""

        def choices(studio: Studio) -> dict[str, Any]:
            names = [*before, *([] if studio.critic else studio.data.classes)]
            value = names[0] if names else None
            if default is not None and not studio.critic:
                value = default(studio)
            return {"choices": names, "value": value, "visible": not studio.critic and not hidden}

        dropdown = gr.Dropdown(**choices(studio), label=label, min_width=150)
        return self.depends(dropdown, lambda studio: gr.Dropdown(**choices(studio)))

    def choice(
        self,
        first: Studio,
        label: str,
        names: Callable[[Studio], list[str]],
        kind: Any = gr.Dropdown,
        words: Mapping[str, str] | None = None,
    ) -> Any:
        """Return a choice of what ``names`` returns for the model, shown in ``words``, the first by default."""

        def choices(studio: Studio) -> dict[str, Any]:
            offered = names(studio)
            return {"choices": [((words or {}).get(name, name), name) for name in offered], "value": offered[0]}

        component = kind(**choices(first), label=label, min_width=200)
        return self.depends(component, lambda studio: kind(**choices(studio)))

    def chooser(self, studio: Studio, place: int) -> Chooser:
        """Return components to choose a test image or upload a picture, with the studio's example ``place`` at first.

        They stand in a row with what else is built there.
        """
        number = studio.example(place)
        image = gr.State(self.test_image(studio.title, number))
        index = gr.Number(number, label="test image", precision=0, minimum=0, min_width=90)
        upload = gr.UploadButton("Upload a picture", file_types=["image"], min_width=80)
        return Chooser(place, image, index, upload, gr.Markdown(image.value.said, render=False))

    def test_image(self, title: str, number: Any) -> Given:
        studio = self.studio(title)
        x, label = studio.image(number)
        return Given(x, label, f"test image {int(number)} of {studio.data.name}, of class {studio.name(label)}")

    def uploaded(self, title: str, path: str | None) -> Given:
        if path is None:
            raise UserError("no picture was uploaded")
        x, done = inputs.read_image(path, self.studio(title).data.shape)
        return Given(x, -1, f"uploaded: {done}", brought=True)

    def choosing(
        self,
        chooser: Chooser,
        outputs: Sequence[Any],
        show: Callable[[Given], Sequence[Any]],
        results: Sequence[Any],
    ) -> None:
        """When another picture is chosen, update ``outputs`` by ``show``, and clear the ``results`` of the last one.

        Another model chooses its example.
        """
        shown = [chooser.image, chooser.said, *outputs]
        values = lambda picture: [picture, picture.said, *show(picture)]
        cleared = lambda title: [clear_component(component)(self.studio(title)) for component in results]

        @show_user_errors
        def choose(title: str, number: Any) -> list[Any]:
            return [*values(self.test_image(title, number)), *cleared(title)]

        @show_user_errors
        def upload(title: str, path: str | None) -> list[Any]:
            return [*values(self.uploaded(title, path)), *cleared(title)]

        chooser.number.input(choose, [self.model, chooser.number], [*shown, *results], **QUIET)
        chooser.upload.upload(upload, [self.model, chooser.upload], [*shown, *results], **QUIET)
        example = lambda studio: self.test_image(studio.title, studio.example(chooser.place))
        for place, output in enumerate(shown):
            self.depends(output, lambda studio, place=place: values(example(studio))[place])
        self.depends(chooser.number, lambda studio: studio.example(chooser.place))

    # Tabs -----------------------------------------------------------------------------------------------------------

    def draw_tab(self, first: Studio, tab: gr.Tab) -> None:
        self.depends(gr.Markdown(self.invitation(first)), self.invitation)
        with gr.Row(elem_classes="controls"):
            kind = self.classes(first, before=[EVERY])
            count = gr.Number(sampling.FIRST, label="how many", minimum=1, maximum=sampling.COUNT, precision=0)
            count.min_width = 100
            go, stop = buttons("Draw", "draw")
        with gr.Accordion("Advanced", open=False):
            with gr.Row():
                method = self.choice(first, "method", Studio.methods, words=METHODS)
                start = gr.Dropdown(**self.start(first, None), min_width=200)
                seed = seed_field()
            with gr.Row():
                dials = [gr.Slider(**d, min_width=220) for d in self.dials(first, None)]
        note = gr.Markdown("", elem_id="sampled")
        images = gr.HTML("", elem_id="samples")
        with gr.Row():
            film = image_view("from start to image", name="film")
            figure = image_view("energy", kind="figure")

        @show_user_errors
        def update_dials(title: str, name: str) -> list[Any]:
            studio = self.studio(title)
            return [*(gr.Slider(**d) for d in self.dials(studio, name)), gr.Dropdown(**self.start(studio, name))]

        def draw(job: Job, title: str, kind: str, count: Any, name: str, start: str, seed: Any, *dials: Any) -> Any:
            studio = self.studio(title)
            sampler = sampling.build_sampler(studio, name, start, *dials)
            return sampling.sample(studio, sampler, kind, count, seed, job)

        def draw_first(job: Job, title: str, *ignored: Any) -> Any:
            return sampling.sample_first(self.studio(title), job)

        method.input(update_dials, [self.model, method], [*dials, start], **QUIET)
        for place, slider in enumerate(dials):
            self.depends(slider, lambda s, place=place: gr.Slider(**self.dials(s, None)[place]))
        self.depends(start, lambda s: gr.Dropdown(**self.start(s, None)))
        taken = [self.model, kind, count, method, start, seed, *dials]
        also = self.at_work(go, stop, draw, taken, [images, film, figure, note])
        self._first.append(lambda event: also(event, draw_first))

    def invitation(self, studio: Studio) -> str:
        if studio.critic:
            return "### This network can draw: press Draw."
        return "### This classifier can draw: pick a class."

    def dials(self, studio: Studio, method: str | None) -> list[dict[str, Any]]:
        """Return labels, ranges and values of the sliders for a sampler's α, β, η and K."""
        sampler = studio.sampler(method)
        a, steps = sampler.step_size, sampler.steps
        largest = max(1.0, round(0.5 * math.prod(studio.data.shape) ** 0.5))
        far = "largest distance from the start β; 0: no limit"
        return [
            {"label": "step size α", "minimum": a / 10, "maximum": 10 * a, "step": a / 10, "value": a},
            {"label": far, "minimum": 0, "maximum": largest, "step": 0.1, "value": sampler.radius or 0},
            {"label": "noise η", "minimum": 0, "maximum": 0.1, "step": 0.005, "value": sampler.noise},
            {"label": "steps K", "minimum": 0, "maximum": max(200, 2 * steps), "step": 1, "value": steps},
        ]

    def start(self, studio: Studio, method: str | None) -> dict[str, Any]:
        """Return the choices for where a sampler's chains start."""
        sampler = studio.sampler(method)
        choices = [(STARTS[name], name) for name in studio.starts(sampler)]
        return {"choices": choices, "value": sampler.start, "label": "start from"}

    def edit_tab(self, first: Studio, tab: gr.Tab) -> None:
        gr.Markdown("### Change a picture: press Edit.")
        tool = self.choice(first, "what to do", editing.offered_tools, gr.Radio)
        about = gr.Markdown(editing.TOOLS[tool.value].about)
        with gr.Row(elem_classes="controls"):
            kind = self.classes(first, before=[editing.ANY])
            other_class = gr.Dropdown(list(first.data.classes), label="second class", visible=False, min_width=150)
            other_image = gr.Number(1, label="second test image", precision=0, minimum=0, visible=False, min_width=150)
            chooser = self.chooser(first, 0)
            empty = gr.Button("Empty picture", min_width=80)
            go, stop = buttons("Edit", "edit")
        with gr.Accordion("Advanced", open=False), gr.Row():
            steps = gr.Slider(1, editing.STEPS, 40, step=1, label="steps; more of them change more", min_width=220)
            dials = [gr.Slider(0, 1, visible=False, min_width=220) for _ in range(2)]
            seed = seed_field()
        chooser.said.render()
        note = gr.Markdown("", elem_id="change")
        with gr.Row():
            with gr.Column(min_width=280):
                editor = Canvas(
                    self.canvas(self.test_image(first.title, first.example(0)), brushed=True),
                    type="pil",
                    format="png",
                    sources=(),
                    transforms=(),
                    layers=False,
                    canvas_size=(CANVAS, CANVAS),
                    fixed_canvas=True,
                    brush=gr.Brush(default_size=CANVAS // 8, colors=[RED, "#ffffff", "#000000", "#888888"]),
                    label="picture; brush on it",
                    elem_id="canvas",
                )
            with gr.Column(min_width=280):
                result = image_view("result", name="edited")
        film = image_view("from where the search began to the result")

        @show_user_errors
        def update_form(name: str) -> list[Any]:
            spec = editing.TOOLS[name]
            sliders = [gr.Slider(d.low, d.high, d.value, step=d.step, label=d.label, visible=True) for d in spec.dials]
            hidden = [gr.Slider(visible=False)] * (len(dials) - len(sliders))
            image, kind = gr.Number(visible=spec.other == "image"), gr.Dropdown(visible=spec.other == "class")
            about = spec.about if spec.brush else f"{spec.about} Strokes are not used."
            return [about, image, kind, *sliders, *hidden]

        def edit(job: Job, title: str, picture: Given, strokes: Any, *rest: Any) -> editing.EditShown:
            name, kind, other_class, other_image, d1, d2, steps, seed = rest
            studio = self.studio(title)
            x = self.fitting(studio, picture).x
            paint, where = inputs.read_strokes(strokes["layers"], x.shape)
            other = other_image if editing.TOOLS[name].other == "image" else other_class
            return editing.apply_tool(
                studio, x, paint, where, editing.EditForm(name, kind, steps, [d1, d2], other, seed), job
            )

        tool.input(update_form, tool, [about, other_image, other_class, *dials], **QUIET)
        self.depends(about, lambda s: editing.TOOLS[editing.offered_tools(s)[0]].about)
        for hidden in (other_image, *dials):
            self.depends(hidden, lambda s: gr.update(visible=False))
        self.depends(
            other_class, lambda s: gr.Dropdown(choices=list(s.data.classes), value=s.data.classes[0], visible=False)
        )
        shown = [result, film, note]
        brushed = lambda picture: [self.canvas(picture, brushed=not picture.brought)]
        self.choosing(chooser, [editor], brushed, shown)

        @show_user_errors
        def clear_picture(title: str) -> list[Any]:
            picture = Given(
                torch.zeros(self.studio(title).data.shape), -1, "an empty picture: paint on it", brought=True
            )
            return [picture, picture.said, self.canvas(picture, brushed=False)]

        empty.click(clear_picture, self.model, [chooser.image, chooser.said, editor], **QUIET)
        taken = [self.model, chooser.image, editor, tool, kind, other_class, other_image, *dials, steps, seed]
        self.at_work(go, stop, edit, taken, shown)

    def canvas(self, given: Given, *, brushed: bool) -> dict[str, Any]:
        """Return a picture for the editor; ``brushed``: with its middle brushed over."""
        picture = views.enlarge(given.x, CANVAS).convert("RGBA")
        layers, composite = [], picture
        if brushed:
            layer = Image.new("RGBA", picture.size)
            wide, high = picture.size
            ImageDraw.Draw(layer).ellipse([0.22 * wide, 0.25 * high, 0.78 * wide, 0.81 * high], fill=RED)
            layers, composite = [layer], Image.alpha_composite(picture, layer)
        return {"background": picture, "layers": layers, "composite": composite}

    def fitting(self, studio: Studio, picture: Given | None) -> Given:
        """Return the picture; raise UserError if it does not have the model's image shape."""
        if picture is None or tuple(picture.x.shape) != studio.data.shape:
            raise UserError("the picture is not of the size that this model takes; choose another")
        return picture

    def explain_tab(self, first: Studio, tab: gr.Tab) -> None:
        explained = gr.State()
        self.depends(gr.Markdown(self.question(first)), self.question)
        with gr.Column(visible=not first.critic) as everything:
            with gr.Row(elem_classes="controls"):
                target = self.classes(first, "class to be taken for", default=lambda s: s.second_class(s.example(1)))
                chooser = self.chooser(first, 1)
                go, stop = buttons("Explain", "explain")
            with gr.Accordion("Advanced", open=False), gr.Row():
                level = gr.Slider(0.5, 0.99, 0.8, step=0.01, label="probability to reach")
                steps = gr.Slider(5, 200, 40, step=5, label="steps of each of 8 searches")
            chooser.said.render()
            note = gr.Markdown("", elem_id="explained")
            with gr.Row(elem_classes="pictures"):
                before = image_view("before", value=views.enlarge(self.test_image(first.title, first.example(1)).x))
                after = image_view("after", name="counterfactual")
                added = image_view("change")
            share = gr.Slider(
                0, 100, 100, step=5, label="from the image to the counterfactual, %", elem_id="way", visible=False
            )
            at = gr.Markdown("")
            figure = image_view("what the model says on the way", kind="figure")
        self.depends(everything, lambda s: gr.update(visible=not s.critic))

        def explain(job: Job, title: str, picture: Given, target: str, level: Any, steps: Any, *ignored: Any) -> Any:
            studio = self.studio(title)
            return editing.explain(studio, self.fitting(studio, picture).x, target, level, steps, job)

        def explain_first(job: Job, title: str, *values: Any) -> Any:
            if self.studio(title).critic or values[-1] is not None:  # something is there
                return None
            return self.studio(title).keep("explained", lambda: explain(job, title, *values), job)

        def show(news: editing.Explained) -> list[Any]:
            return [news, 100, *editing.moment(news, 100), editing.way(news), news.note]

        @show_user_errors
        def show_moment(news: editing.Explained | None, share: Any) -> list[Any]:
            return [gr.skip()] * 3 if news is None else list(editing.moment(news, share))

        shown = [explained, share, after, added, at, figure, note]
        also = self.at_work(
            go, stop, explain, [self.model, chooser.image, target, level, steps, explained], shown, show=show
        )
        also(tab.select, explain_first)
        share.input(show_moment, [explained, share], [after, added, at], **QUIET)
        self.choosing(chooser, [before], lambda picture: [views.enlarge(picture.x)], shown)

    def question(self, studio: Studio) -> str:
        if studio.critic:
            return "This model is a critic: it has no classes, so there is nothing to explain."
        return "### What would have to change for the model to see another class?"

    def robustness_tab(self, first: Studio, tab: gr.Tab) -> None:
        threat = first.run.recipe.threat
        gr.Markdown("### What does a small change do to the answer of the model?")
        with gr.Row(elem_classes="controls"):
            attack = self.choice(first, "attack", attacking.attack_names)
            target = self.classes(
                first, "class to attack towards", default=lambda s: s.second_class(s.example(-1)), hidden=True
            )
            chooser = self.chooser(first, -1)
            go, stop = buttons("Attack", "attack")
        with gr.Accordion("Advanced", open=False), gr.Row():
            norms = [("l∞: the largest change of a value", "linf"), ("l2: the root of their squares' sum", "l2")]
            norm = gr.Radio(norms, value=threat.norm, label="size of a change, by the norm")
            eps = gr.Number(round(threat.eps, 6), label="largest size ε, for values in [0, 1]", minimum=0)
            steps = gr.Slider(1, attacking.STEPS, threat.steps, step=1, label="steps")
            seed = seed_field()
        chooser.said.render()
        note = gr.Markdown("", elem_id="verdict")
        with gr.Row(elem_classes="pictures"):
            before = image_view("before", value=views.enlarge(self.test_image(first.title, first.example(-1)).x))
            after = image_view("after", name="attacked")
            added = image_view("change")
        with gr.Row():
            figure = image_view("probabilities", kind="figure")
            with gr.Column(min_width=280):
                table = gr.HTML("")

        def run(job: Job, title: str, picture: Given, *rest: Any) -> attacking.AttackShown:
            name, target, norm, eps, steps, seed = rest
            studio = self.studio(title)
            x, label = self.fitting(studio, picture)[:2]
            return attacking.attack(studio, x, label, name, norm, eps, steps, target, seed, job)

        self.depends(norm, lambda s: s.run.recipe.threat.norm)
        self.depends(eps, lambda s: round(s.run.recipe.threat.eps, 6))
        self.depends(steps, lambda s: s.run.recipe.threat.steps)
        show_target = lambda name: gr.Dropdown(visible=name == attacking.TARGETED_PGD)
        attack.change(show_target, attack, target, **QUIET)
        shown = [before, after, added, figure, table, note]
        self.choosing(chooser, [before], lambda picture: [views.enlarge(picture.x)], shown[1:])
        taken = [self.model, chooser.image, attack, target, norm, eps, steps, seed]
        show = lambda news: news._replace(table=views.table(["", "before", "after"], news.table))
        self.at_work(go, stop, run, taken, shown, show=show)

    def landscape_tab(self, first: Studio, tab: gr.Tab) -> None:
        gr.Markdown("### The energy around a chain, from its start to the image that it draws")
        with gr.Row(elem_classes="controls"):
            kind = self.classes(first)
            through = gr.Dropdown(
                [
                    ("the path, and where it bends most", "path"),
                    ("the gradient at the image, and at random", "gradient"),
                    ("two random directions at the image", "random"),
                ],
                value="path",
                label="plane through",
                min_width=200,
            )
            go, stop = buttons("Measure", "measure")
        with gr.Accordion("Advanced", open=False), gr.Row():
            method = self.choice(first, "method", Studio.methods, words=METHODS)
            steps = gr.Slider(2, slicing.STEPS, max(2, first.sampler().steps), step=1, label="steps K")
            seed = seed_field()
        note = gr.Markdown("", elem_id="sliced")
        film = image_view("from start to image")
        figure = image_view("energy", name="slice", kind="figure")

        def measure(
            job: Job, title: str, name: str, kind: str, through: str, steps: Any, seed: Any
        ) -> slicing.LandscapeShown:
            studio = self.studio(title)
            plain = config.describe(studio.sampler(name))
            whole = inputs.parse_integer(steps, "K, the number of steps", 2, slicing.STEPS)
            sampler = config.build({**plain, "steps": whole}, "sampler")
            return slicing.slice_energy(studio, sampler, kind, through, seed, job)

        self.depends(steps, lambda s: max(2, s.sampler().steps))
        self.at_work(go, stop, measure, [self.model, method, kind, through, steps, seed], [figure, film, note])

    def toy_tab(self, first: Studio, tab: gr.Tab) -> None:
        gr.Markdown(
            "### Train an energy on points of the plane\nBinary adversarial training learns where data are, maximum "
            "likelihood how many."
        )
        with gr.Row(elem_classes="controls"):
            density = gr.Dropdown(list(densities.DENSITIES), value="moons", label="data", min_width=150)
            method = gr.Dropdown(list(toy_training.METHODS), value="binary-at", label="training", min_width=150)
            go, stop = buttons("Train", "train")
        with gr.Accordion("Advanced", open=False), gr.Row():
            p0 = gr.Radio(list(toy_training.P0), value="uniform", label="where contrastive points begin")
            updates = gr.Slider(10, planes.UPDATES, 300, step=10, label="updates")
            seed = seed_field()
        note = gr.Markdown("", elem_id="played")
        with gr.Row():
            picture = image_view("plane", name="plane", kind="figure")
            with gr.Column(min_width=280):
                table = gr.HTML("")
        film = image_view("the training", kind="figure")

        def train(job: Job, density: str, method: str, p0: str, updates: Any, seed: Any) -> planes.ToyShown:
            return planes.train_density(density, method, p0, updates, seed, job)

        show = lambda news: news._replace(table=news.table and views.table(["", "value", ""], news.table))
        shown = [picture, film, table, note]
        self.at_work(go, stop, train, [density, method, p0, updates, seed], shown, show=show)

    def runs_tab(self, first: Studio, tab: gr.Tab) -> None:
        everything = list(self.studios.values())
        all_head, all_rows = listing.full_table(everything)
        if all_rows:
            gr.HTML(views.table(*listing.headline_table(everything)), elem_id="headline")
            if published := [html.escape(studio.title) for studio in everything if listing.is_published(studio.run)]:
                gr.Markdown(f"Published with the model, not measured here: {', '.join(published)}.")
            with gr.Accordion("All records", open=False):
                gr.HTML(views.table(all_head, all_rows), elem_id="records")
        else:
            gr.Markdown("Nothing has been measured yet: `advebm evaluate RUN` does.")
        with gr.Row(elem_classes="controls"):
            go, stop = buttons("Show the report", "report")
            file = gr.DownloadButton("Download it", visible=False)
        note, report = gr.Markdown(""), gr.HTML("", elem_id="shown")

        def show(job: Job, title: str) -> tuple[str, str, str]:
            path = listing.report(self.studio(title), self.folder)
            frame = f'<iframe sandbox srcdoc="{html.escape(path.read_text(), quote=True)}" class="report"></iframe>'
            return frame, str(path), f"report of {html.escape(title)}"

        self.at_work(go, stop, show, [self.model], [report, file, note])


def present(component: Any, value: Any) -> Any:
    """Return the update that shows a result; for None, the one that leaves the component as it is."""
    if value is None:
        return gr.skip()
    return gr.update(value=value, visible=True) if isinstance(component, UNTIL_SHOWN) else value


def clear_component(component: Any) -> Callable[[Studio], Any]:
    """Return the update that clears a result: hidden, empty text, or None."""
    if isinstance(component, gr.Slider):
        return lambda studio: gr.update(visible=False)
    if isinstance(component, UNTIL_SHOWN):
        return lambda studio: gr.update(value=None, visible=False)
    return lambda studio: "" if isinstance(component, gr.Markdown | gr.HTML) else None
