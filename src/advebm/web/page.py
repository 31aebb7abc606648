"""The page: its components and the functions they call, which are in the other modules of this package."""

import functools
import html
from abc import ABCMeta
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
import torch
from gradio.components.base import server
from torch import Tensor

from advebm.core import config
from advebm.core.errors import UserError, unknown_name
from advebm.toy import densities
from advebm.toy import train as toy_training
from advebm.web import attacking, editing, inputs, listing, planes, sampling, slicing, views
from advebm.web.jobs import Job, Jobs, Stopped
from advebm.web.studio import EVERY, Studio

CSS = """
.gradio-container { width: 100%; max-width: 1280px !important; margin: 0 auto; }
.sight { padding-top: 34px !important; }
.sight .icon-button-wrapper { transform: translateY(-34px); }
.pixels img { image-rendering: pixelated; }
.note .error, .note .clear-status { display: none; }
.about p { opacity: 0.7; margin: 0; }
footer { display: none !important; }
iframe.report { width: 100%; height: 80vh; border: 1px solid var(--border-color-primary); }
"""
FONTS: dict[str, Any] = {"font": ("system-ui", "sans-serif"), "font_mono": ("ui-monospace", "monospace")}
THEME = gr.themes.Default(primary_hue="blue", **FONTS)  # with fonts of the visitor's system, none from other servers
CANVAS = 320
MAX_STROKES = 32  # limit of stored brush strokes that wait to be used
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}  # options of events


class Given(NamedTuple):
    """A picture that a visitor chose: an image (C, H, W), its label or -1, and a description."""

    x: Tensor
    label: int
    said: str


class Chooser(NamedTuple):
    """Components to choose a picture with."""

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


def image_view(
    label: str, *, value: Any = None, name: str | None = None, kind: str = "pixels", visible: bool = True
) -> gr.Image:
    """Return a component that shows a picture: ``pixels`` as squares, or a ``figure``."""
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
        visible=visible,
    )


def buttons(label: str, name: str) -> tuple[gr.Button, gr.Button]:
    """Return a start and a stop button, side by side."""
    with gr.Row():
        return gr.Button(label, variant="primary", elem_id=name, min_width=80), gr.Button("Stop", min_width=80)


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

    def studio(self, title: str) -> Studio:
        if title not in self.studios:
            raise unknown_name("run", title, self.studios)
        return self.studios[title]

    # Events ---------------------------------------------------------------------------------------------------------

    def at_work(
        self,
        button: gr.Button,
        stop: gr.Button,
        work: Callable[..., Any],
        taken: Sequence[Any],
        shown: Sequence[Any],
        *,
        show: Callable[[Any], Sequence[Any]] = lambda news: news,
    ) -> Any:
        """Call ``work(job, *values)`` when the button is pressed; return the event.

        Values of the components ``taken`` are passed on.  Reports and results go through ``show`` to the components
        ``shown``, of which the last is a note.  If the model is among ``taken``, choosing another one clears ``shown``.
        """

        def run(request: gr.Request, *values: Any) -> Iterator[Any]:
            unchanged = [gr.skip()] * (len(shown) - 1)
            try:
                with self.jobs.begin(str(request.session_hash)) as job:
                    for news in job.follow(lambda job: work(job, *values)):
                        yield [*unchanged, news] if isinstance(news, str) else [skip_if_none(v) for v in show(news)]
            except Stopped:
                yield [*unchanged, "stopped"]
            except UserError as error:
                yield [*unchanged, html.escape(str(error))]
                raise message(error) from None

        shown[-1].elem_classes = ["note"]  # it shows errors itself, so Gradio's error sign is hidden
        options: Any = {"show_progress": "minimal", "show_progress_on": shown[-1], "api_visibility": "private"}
        event = button.click(run, taken, shown, **options)
        self._outputs += shown if self.model in taken else []
        stop.click(self.leave, queue=False, **QUIET)
        return event

    def depends(self, component: Any, update: Callable[..., Any]) -> Any:
        """Register how a component is updated for another model, and return the component."""
        self._updates.append((component, update))
        return component

    # Parts ----------------------------------------------------------------------------------------------------------

    def build(self) -> gr.Blocks:
        first = next(iter(self.studios.values()))
        with gr.Blocks(title="advebm", analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
            with gr.Row(equal_height=True):
                gr.Markdown("# advebm")
                self.model = gr.Dropdown(
                    list(self.studios), value=first.title, label="model", visible=len(self.studios) > 1, scale=2
                )
            self.depends(gr.Markdown(first.about(), elem_classes="about"), Studio.about)
            for name, part in (
                ("Sample", self.sample_tab),
                ("Edit", self.edit_tab),
                ("Explain", self.explain_tab),
                ("Robustness", self.robustness_tab),
                ("Landscape", self.landscape_tab),
                ("Toy", self.toy_tab),
                ("Runs", self.runs_tab),
            ):
                with gr.Tab(name, id=name.lower()):
                    part(first)
            updated = [component for component, _ in self._updates]
            for component in self._outputs:
                if component not in updated and not isinstance(component, gr.Slider):
                    self.depends(component, clear_component(component))
            components, updates = zip(*self._updates, strict=True)

            @show_user_errors
            def turn(title: str, request: gr.Request) -> list[Any]:
                studio = self.studio(title)
                self.leave(request)
                return [update(studio) for update in updates]

            self.model.change(turn, self.model, list(components), **QUIET)
            blocks.unload(self.leave)
        return blocks

    def leave(self, request: gr.Request) -> None:
        """Stop all jobs of a visitor who left, pressed Stop or chose another model."""
        self.jobs.stop(str(request.session_hash))

    def classes(
        self, studio: Studio, label: str = "class", *, before: Sequence[str] = (), at: int = 0, hidden: bool = False
    ) -> gr.Dropdown:
        """Return a choice of ``before`` and the classes; for a critic it is hidden and has only ``before``."""

        def choices(studio: Studio) -> dict[str, Any]:
            names = [*before, *([] if studio.critic else studio.data.classes)]
            value = names[min(at, len(names) - 1)] if names else None
            return {"choices": names, "value": value, "visible": not studio.critic and not hidden}

        dropdown = gr.Dropdown(**choices(studio), label=label)
        return self.depends(dropdown, lambda studio: gr.Dropdown(**choices(studio)))

    def choice(self, first: Studio, label: str, names: Callable[[Studio], list[str]], kind: Any = gr.Dropdown) -> Any:
        """Return a choice of what ``names`` returns for the model, the first by default."""
        component = kind(names(first), value=names(first)[0], label=label)
        return self.depends(component, lambda studio: kind(choices=names(studio), value=names(studio)[0]))

    def chooser(self, studio: Studio, number: int) -> Chooser:
        """Return components to choose a test image or upload a picture."""
        image = gr.State(self.test_image(studio.title, number))
        with gr.Row():
            index = gr.Number(number, label="test image", precision=0, minimum=0, min_width=80)
            upload = gr.UploadButton("Upload a picture", file_types=["image"], size="sm", min_width=80)
        note = gr.Markdown(self.test_image(studio.title, number).said)
        return Chooser(image, index, upload, note)

    def test_image(self, title: str, number: Any) -> Given:
        studio = self.studio(title)
        x, label = studio.image(number)
        return Given(x, label, f"test image {int(number)} of {studio.data.name}, of class {studio.name(label)}")

    def uploaded(self, title: str, path: str | None) -> Given:
        if path is None:
            raise UserError("no picture was uploaded")
        x, done = inputs.read_image(path, self.studio(title).data.shape)
        return Given(x, -1, f"uploaded: {done}")

    def choosing(self, chooser: Chooser, outputs: Sequence[Any], show: Callable[[Given], Sequence[Any]]) -> None:
        """Update ``outputs`` by ``show`` when another picture, or another model, is chosen."""
        shown = [chooser.image, chooser.said, *outputs]
        values = lambda picture: [picture, picture.said, *show(picture)]

        @show_user_errors
        def choose(title: str, number: Any) -> list[Any]:
            return values(self.test_image(title, number))

        @show_user_errors
        def upload(title: str, path: str | None) -> list[Any]:
            return values(self.uploaded(title, path))

        chooser.number.change(choose, [self.model, chooser.number], shown, **QUIET)
        chooser.upload.upload(upload, [self.model, chooser.upload], shown, **QUIET)
        for place, output in enumerate(shown):
            self.depends(output, lambda studio, place=place: values(self.test_image(studio.title, 0))[place])
        self.depends(chooser.number, lambda studio: 0)

    # Tabs -----------------------------------------------------------------------------------------------------------

    def sample_tab(self, first: Studio) -> None:
        with gr.Row():
            with gr.Column(scale=2, min_width=260):
                method = self.choice(first, "method", Studio.methods)
                kind = self.classes(first, before=[EVERY])
                dials = [gr.Slider(**d) for d in self.dials(first, None)]
                with gr.Accordion("more", open=False):
                    start = gr.Dropdown(**self.start(first, None))
                    count = gr.Slider(1, sampling.COUNT, 20, step=1, label="images")
                    seed = gr.Number(0, label="seed", precision=0, minimum=0)
                go, stop = buttons("Draw", "draw")
            with gr.Column(scale=5):
                picture = image_view("images", name="samples")
                note = gr.Markdown("Press **Draw**: chains start from seeds and descend the energy.", elem_id="sampled")
                with gr.Row():
                    film = image_view("from seed to image")
                    figure = image_view("energy", kind="figure")

        @show_user_errors
        def update_dials(title: str, name: str) -> list[Any]:
            studio = self.studio(title)
            return [*(gr.Slider(**d) for d in self.dials(studio, name)), gr.Dropdown(**self.start(studio, name))]

        def draw(job: Job, title: str, name: str, kind: str, a: Any, b: Any, e: Any, k: Any, *rest: Any) -> Any:
            studio, (start, count, seed) = self.studio(title), rest
            sampler = sampling.build_sampler(studio, name, start, a, b, e, k)
            return sampling.sample(studio, sampler, kind, count, seed, job)

        method.input(update_dials, [self.model, method], [*dials, start], **QUIET)

        for place, slider in enumerate(dials):
            self.depends(slider, lambda s, place=place: gr.Slider(**self.dials(s, None)[place]))
        self.depends(start, lambda s: gr.Dropdown(**self.start(s, None)))
        taken = [self.model, method, kind, *dials, start, count, seed]
        self.at_work(go, stop, draw, taken, [picture, film, figure, note])

    def dials(self, studio: Studio, method: str | None) -> list[dict[str, Any]]:
        """Return labels, ranges and values of the sliders for a sampler's α, β, η and K."""
        sampler = studio.sampler(method)
        a, steps = sampler.step_size, sampler.steps
        largest = max(1.0, round(0.5 * studio.data.train.x[0].numel() ** 0.5))
        return [
            {"label": "α, step size", "minimum": a / 10, "maximum": 10 * a, "step": a / 10, "value": a},
            {"label": "β, radius of the ball; 0: none", "maximum": largest, "step": 0.1, "value": sampler.radius or 0},
            {"label": "η, noise", "minimum": 0, "maximum": 0.1, "step": 0.005, "value": sampler.noise},
            {"label": "K, steps", "minimum": 0, "maximum": max(200, 2 * steps), "step": 1, "value": steps},
        ]

    def start(self, studio: Studio, method: str | None) -> dict[str, Any]:
        """Return the choices for where a sampler's chains start."""
        sampler = studio.sampler(method)
        about = {"class": "class Gaussians", "global": "one Gaussian for all", "noise": "uniform noise"}
        about |= {"outside": "outside images", "buffer": "replay buffer"}
        choices = [(about[name], name) for name in studio.starts(sampler)]
        return {"choices": choices, "value": sampler.start, "label": "seeds"}

    def edit_tab(self, first: Studio) -> None:
        with gr.Row():
            with gr.Column(scale=2, min_width=260):
                tool = self.choice(first, "application", editing.offered_tools, gr.Radio)
                about = gr.Markdown(editing.TOOLS[tool.value].about)
                kind = self.classes(first, before=[editing.ANY])
                other_class = gr.Dropdown(list(first.data.classes), label="second class", visible=False)
                other_image = gr.Number(1, label="second test image", precision=0, minimum=0, visible=False)
                dials = [gr.Slider(0, 1, visible=False) for _ in range(2)]
                steps = gr.Slider(1, editing.STEPS, 40, step=1, label="steps; more of them change more")
                seed = gr.Number(0, label="seed", precision=0, minimum=0)
                go, stop = buttons("Edit", "edit")
            with gr.Column(scale=4, min_width=440):
                chooser = self.chooser(first, 0)
                empty = gr.Button("Empty picture", size="sm")
                editor = Canvas(
                    self.canvas(self.test_image(first.title, 0)),
                    type="pil",
                    format="png",
                    sources=(),
                    transforms=(),
                    layers=False,
                    canvas_size=(CANVAS, CANVAS),
                    fixed_canvas=True,
                    brush=gr.Brush(default_size=CANVAS // 8, colors=["#ff2d2d", "#ffffff", "#000000", "#888888"]),
                    label="picture; brush on it",
                    elem_id="canvas",
                )
            with gr.Column(scale=3, min_width=320):
                result = image_view("result", name="edited")
                note = gr.Markdown("", elem_id="change")
                initial = image_view("where the search began")
        film = image_view("on the way")

        @show_user_errors
        def update_form(name: str) -> list[Any]:
            spec = editing.TOOLS[name]
            sliders = [gr.Slider(d.low, d.high, d.value, step=d.step, label=d.label, visible=True) for d in spec.dials]
            hidden = [gr.Slider(visible=False)] * (len(dials) - len(sliders))
            image, kind = gr.Number(visible=spec.other == "image"), gr.Dropdown(visible=spec.other == "class")
            return [spec.about, image, kind, *sliders, *hidden]

        def edit(job: Job, title: str, picture: Given, strokes: Any, *rest: Any) -> editing.EditShown:
            name, kind, other_class, other_image, d1, d2, steps, seed = rest
            studio = self.studio(title)
            x = self.fitting(studio, picture).x
            paint, where = inputs.read_strokes(strokes["layers"], x.shape)
            other = other_image if editing.TOOLS[name].other == "image" else other_class
            return editing.apply_tool(
                studio, x, paint, where, editing.EditForm(name, kind, steps, [d1, d2], other, seed), job
            )

        dependent = [about, other_image, other_class, *dials]
        tool.change(update_form, tool, dependent, **QUIET)
        self.depends(other_class, lambda s: gr.Dropdown(choices=list(s.data.classes), value=s.name(0)))
        self.choosing(chooser, [editor], lambda picture: [self.canvas(picture)])

        @show_user_errors
        def clear_picture(title: str) -> list[Any]:
            picture = Given(torch.zeros(self.studio(title).data.shape), -1, "an empty picture: paint on it")
            return [picture, picture.said, self.canvas(picture)]

        shown = [chooser.image, chooser.said, editor]
        empty.click(clear_picture, self.model, shown, **QUIET)
        taken = [self.model, chooser.image, editor, tool, kind, other_class, other_image, *dials, steps, seed]
        self.at_work(go, stop, edit, taken, [initial, result, film, note])

    def canvas(self, given: Given) -> dict[str, Any]:
        picture = views.enlarge(given.x, CANVAS).convert("RGBA")
        return {"background": picture, "layers": [], "composite": picture}

    def fitting(self, studio: Studio, picture: Given | None) -> Given:
        """Return the picture; raise UserError if it does not have the model's image shape."""
        if picture is None or tuple(picture.x.shape) != studio.data.shape:
            raise UserError("the picture is not of the size that this model takes; choose another")
        return picture

    def explain_tab(self, first: Studio) -> None:
        explained = gr.State()
        with gr.Row():
            with gr.Column(scale=2, min_width=260):
                question = gr.Markdown(self.question(first))
                chooser = self.chooser(first, 0)
                target = self.classes(first, "class to be taken for", at=8)
                level = gr.Slider(0.5, 0.99, 0.8, step=0.01, label="probability to reach")
                steps = gr.Slider(5, 200, 40, step=5, label="steps of each of 8 searches")
                go, stop = buttons("Explain", "explain")
                self.depends(question, self.question)
                self.depends(go, lambda s: gr.Button(interactive=not s.critic))
            with gr.Column(scale=5):
                share = gr.Slider(0, 100, 100, step=5, label="from the image to the counterfactual, %", elem_id="way")
                with gr.Row():
                    image = image_view("image", value=views.enlarge(self.test_image(first.title, 0).x))
                    added = image_view("change")
                at = gr.Markdown("")
                figure = image_view("what the model says", kind="figure")
                note = gr.Markdown("", elem_id="explained")

        def explain(job: Job, title: str, picture: Given, target: str, level: Any, steps: Any) -> editing.Explained:
            studio = self.studio(title)
            return editing.explain(studio, self.fitting(studio, picture).x, target, level, steps, job)

        def show(news: editing.Explained) -> list[Any]:
            return [news, 100, *editing.moment(news, 100), editing.way(news), news.note]

        @show_user_errors
        def show_moment(news: editing.Explained | None, share: Any) -> list[Any]:
            return [gr.skip()] * 3 if news is None else list(editing.moment(news, share))

        shown = [explained, share, image, added, at, figure, note]
        self.at_work(go, stop, explain, [self.model, chooser.image, target, level, steps], shown, show=show)
        share.input(show_moment, [explained, share], [image, added, at], **QUIET)
        self.choosing(chooser, [image], lambda picture: [views.enlarge(picture.x)])

    def question(self, studio: Studio) -> str:
        if studio.critic:
            return "This model is a critic: it has no classes, so there is nothing to explain."
        return "What would have to change for the model to see another class?"

    def robustness_tab(self, first: Studio) -> None:
        threat = first.run.recipe.threat
        with gr.Row():
            with gr.Column(scale=2, min_width=260):
                chooser = self.chooser(first, 0)
                attack = self.choice(first, "attack", attacking.attack_names)
                target = self.classes(first, "class to attack towards", at=8, hidden=True)
                norm = gr.Radio(["linf", "l2"], value=threat.norm, label="norm")
                eps = gr.Number(round(threat.eps, 6), label="eps, radius in pixels of [0, 1]", minimum=0)
                steps = gr.Slider(1, attacking.STEPS, threat.steps, step=1, label="steps")
                seed = gr.Number(0, label="seed", precision=0, minimum=0)
                go, stop = buttons("Attack", "attack")
            with gr.Column(scale=5):
                with gr.Row():
                    before = image_view("image", value=views.enlarge(self.test_image(first.title, 0).x))
                    after = image_view("attacked", name="attacked")
                    added = image_view("what was added, amplified")
                note = gr.Markdown("", elem_id="verdict")
                with gr.Row():
                    figure = image_view("probabilities", kind="figure", visible=not first.critic)
                    table = gr.Dataframe(headers=["", "before", "after"], interactive=False, wrap=True)

        def run(job: Job, title: str, picture: Given, *rest: Any) -> attacking.AttackShown:
            name, target, norm, eps, steps, seed = rest
            studio = self.studio(title)
            x, label, _ = self.fitting(studio, picture)
            return attacking.attack(studio, x, label, name, norm, eps, steps, target, seed, job)

        self.depends(figure, lambda s: gr.Image(value=None, visible=not s.critic))
        self.depends(norm, lambda s: s.run.recipe.threat.norm)
        self.depends(eps, lambda s: round(s.run.recipe.threat.eps, 6))
        show_target = lambda name: gr.Dropdown(visible=name == attacking.TARGETED_PGD)
        attack.change(show_target, attack, target, **QUIET)
        self.choosing(chooser, [before], lambda picture: [views.enlarge(picture.x)])
        taken = [self.model, chooser.image, attack, target, norm, eps, steps, seed]
        self.at_work(go, stop, run, taken, [before, after, added, figure, table, note])

    def landscape_tab(self, first: Studio) -> None:
        with gr.Row():
            with gr.Column(scale=2, min_width=260):
                gr.Markdown("The energy in a plane, with the path of a chain from its seed to an image.")
                method = self.choice(first, "method", Studio.methods)
                kind = self.classes(first)
                through = gr.Radio(
                    [
                        ("the path, and where it bends most", "path"),
                        ("the gradient at the image, and at random", "gradient"),
                        ("two random directions at the image", "random"),
                    ],
                    value="path",
                    label="plane through",
                )
                steps = gr.Slider(2, slicing.STEPS, max(2, first.sampler().steps), step=1, label="K, steps")
                seed = gr.Number(0, label="seed", precision=0, minimum=0)
                go, stop = buttons("Measure", "measure")
            with gr.Column(scale=5):
                figure = image_view("energy", name="slice", kind="figure")
                note = gr.Markdown("", elem_id="sliced")
                film = image_view("from seed to image")

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

    def toy_tab(self, first: Studio) -> None:
        with gr.Row():
            with gr.Column(scale=2, min_width=260):
                gr.Markdown(
                    "Train an energy on points of the plane: binary adversarial training learns where data are, "
                    "maximum likelihood how many."
                )
                density = gr.Dropdown(list(densities.DENSITIES), value="moons", label="data")
                method = gr.Radio(list(toy_training.METHODS), value="binary-at", label="training")
                p0 = gr.Radio(list(toy_training.P0), value="uniform", label="where contrastive points begin")
                updates = gr.Slider(10, planes.UPDATES, 300, step=10, label="updates")
                seed = gr.Number(0, label="seed", precision=0, minimum=0)
                go, stop = buttons("Train", "train")
            with gr.Column(scale=5):
                with gr.Row():
                    picture = image_view("plane", name="plane", kind="figure")
                    table = gr.Dataframe(headers=["", "value", ""], interactive=False, wrap=True)
                note = gr.Markdown("", elem_id="played")
                film = image_view("the training", kind="figure")

        def train(job: Job, density: str, method: str, p0: str, updates: Any, seed: Any) -> planes.ToyShown:
            return planes.train_density(density, method, p0, updates, seed, job)

        self.at_work(go, stop, train, [density, method, p0, updates, seed], [picture, film, table, note])

    def runs_tab(self, first: Studio) -> None:
        head, rows = listing.table(list(self.studios.values()))
        if rows:
            gr.Dataframe(rows, headers=head, interactive=False, wrap=True, label="measured", elem_id="records")
        else:
            gr.Markdown("Nothing has been measured yet: `advebm evaluate RUN` does.")
        with gr.Row():
            go = gr.Button("Show the report", variant="primary", elem_id="report", min_width=80)
            stop = gr.Button("Stop", min_width=80)
            file = gr.DownloadButton("Download it", visible=False)
        note, report = gr.Markdown(""), gr.HTML("", elem_id="shown")

        def show(job: Job, title: str) -> tuple[str, Any, str]:
            path = listing.report(self.studio(title), self.folder)
            frame = f'<iframe sandbox srcdoc="{html.escape(path.read_text(), quote=True)}" class="report"></iframe>'
            return frame, gr.DownloadButton(value=str(path), visible=True), f"report of {title}"

        self.at_work(go, stop, show, [self.model], [report, file, note])


def clear_component(component: Any) -> Callable[[Studio], Any]:
    """Return the update that clears a component: empty text, or None."""
    empty = "" if isinstance(component, gr.Markdown | gr.HTML) else None
    return lambda studio: empty


def skip_if_none(value: Any) -> Any:
    """Return ``value``; for None, the update that leaves a component as it is."""
    return gr.skip() if value is None else value
