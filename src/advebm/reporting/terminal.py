"""Print tables to standard output."""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from advebm.attacks.projected import Attack
from advebm.diagnostics import doctor
from advebm.evaluation.leaderboard import Leaderboard
from advebm.evaluation.speedrun import Speedrun
from advebm.metrics.base import Record
from advebm.metrics.keys import key_of
from advebm.metrics.texts import as_text, short_text
from advebm.papers import render
from advebm.reporting import speedrun as speedrun_page
from advebm.reporting import sweep as sweep_page
from advebm.reporting.records import best_set, class_tables, find_accuracies, pivot, rate_sets
from advebm.training.cost import Estimate, Passes
from advebm.training.hardware import GB, TERA, Machine
from advebm.training.sweep import Sweep

MEANINGS = {
    "FD": "FD: distance to real images, lower is better.",
    "intended class": "intended class: share classified as what was asked for; of critics, as any class of the data.",
    "recall": "recall: share of real images that have samples nearby, higher is better.",
}


def print_records(records: Iterable[Record]) -> None:
    """Print one row for each record; then, for samples, the share of each class that is classified as intended."""
    plain = [asdict(record) for record in records]
    rows = [[text[key] for key in ("name", "samples", "value", "count", "caution")] for text in map(as_text, plain)]
    width = 5 if any(row[4] for row in rows) else 4
    _print_rows(["measured", "samples", "value", "n", "but"][:width], [row[:width] for row in rows])
    for heads, rows in class_tables(plain):
        print()
        _print_rows(heads, rows)


def print_side_by_side(runs: Mapping[str, Iterable[Mapping[str, Any]]]) -> None:
    """Print a column for each run and a row for each quantity."""
    _print_rows(*pivot(runs).quantities_down())


def print_accuracies(runs: Mapping[str, Sequence[Mapping[str, Any]]], threat: Attack) -> None:
    """Print a row for each run: its accuracy, clean and under the strongest measured attack of the threat's radius."""
    found = {title: find_accuracies(records, threat) for title, records in runs.items()}
    attacks = {key.text for _, r in found.values() if r is not None and (key := key_of(r).attack) is not None}
    rows = [[title, *("" if r is None else short_text(r) for r in pair)] for title, pair in found.items()]
    _print_rows(["accuracy", "clean", f"attacked ({', '.join(sorted(attacks))})"], rows)


def print_sets(runs: Mapping[str, Iterable[Mapping[str, Any]]], measures: Sequence[str]) -> None:
    """Print a row for each set of samples, the best number of a column marked, a table for each feature space."""
    for space, sets in rate_sets(runs).items():
        columns = [m for m in measures if any(m in s.records for s in sets)]
        best = {m: best_set(sets, m) for m in columns}
        rows = []
        for s in sets:
            texts = [short_text(s.records[m]) + " best" * (best[m] is s) if m in s.records else "" for m in columns]
            rows.append([s.name, s.run + " *" * s.judges_itself, *texts])
        _print_rows(["samples", "drawn from", *columns], rows)
        print(*(MEANINGS[m] for m in columns if m in MEANINGS), f"All by {space}; ± one standard error.", sep="\n")
        if any(s.judges_itself for s in sets):
            print("* judged by the network that they were drawn from: not a fair rating, and never marked best.")


def print_runs(runs: Mapping[str, Iterable[Mapping[str, Any]]]) -> None:
    """Print tables with a row for each run and at most 8 quantities as columns: for many runs."""
    table = pivot(runs)
    quantities = list(table.cells)
    for first in range(0, len(quantities), 8):
        columns = quantities[first : first + 8]
        _print_rows(*table.runs_down(columns), width=60 + 14 * len(columns))
        print()


def print_leaderboard(board: Leaderboard) -> None:
    """Print a row for each model, the most robust first, and where the files are."""
    heads, rows = board.table()
    _print_rows(heads, rows, width=60 + 16 * len(heads))
    print(f"FD, lower is better, and class score: by {board.protocol.features}; ± one standard error.")
    print(board.folder)


def print_sweep(sweep: Sweep) -> None:
    """Print a row for each combination, the best first, what the columns are, and where the files are."""
    heads, rows = sweep.table()
    _print_rows(heads, rows, width=60 + 12 * len(heads))
    print(*sweep_page.legend(sweep), sep="\n")
    print(sweep.folder)


def print_speedrun(found: Speedrun) -> None:
    """Print a row for each recipe, what the columns are, and where the files are."""
    heads, rows = found.table()
    _print_rows(heads, rows, width=60 + 16 * len(heads))
    print(*speedrun_page.legend(found), sep="\n")
    print(found.folder)


def print_paper_table(summary: Mapping[str, Any]) -> None:
    """Print the paper's numbers beside ours; above them how they were measured, below them the claims and verdict."""
    where, verdict = render.text_lines(summary)
    heads, rows = render.text_table(summary)
    print(f"{summary['table']} ({summary['paper']}, {summary['item']}): {where}")
    _print_rows(heads, rows, width=40 + 17 * len(heads))
    print("\n".join(verdict))


def print_numbers(rows: Mapping[str, Mapping[str, float]]) -> None:
    """Print named numbers, with a row for each title; the cell is empty where a title lacks a number."""
    columns = list(dict.fromkeys(name for numbers in rows.values() for name in numbers))
    texts = [
        [title, *(f"{numbers[name]:.3f}" if name in numbers else "" for name in columns)]
        for title, numbers in rows.items()
    ]
    _print_rows(["", *columns], texts, width=150)


def print_figures(figures: Mapping[str, Mapping[str, Any]]) -> None:
    """Print a table for each figure, with a row for each number and a column for each model, if they are by model."""
    for name, numbers in figures.items():
        models = numbers if all(isinstance(v, Mapping) for v in numbers.values()) else {"": numbers}
        _print_columns(name, {model: {q: _number(v) for q, v in values.items()} for model, values in models.items()})


def _number(value: Any) -> str:
    return f"{value[0]:.3g} ± {value[1]:.2g}" if isinstance(value, list) else f"{value:.3g}"


def print_findings(findings: Iterable[doctor.Finding]) -> None:
    """Print each finding, then the skipped checks; if there is no fault, print what was checked."""
    findings = list(findings)
    for finding in (f for f in findings if f.severity != "skipped"):
        print(f"{finding.severity}: {finding.name}")
        for line in (f"found: {finding.what}", f"to do: {finding.fix}"):
            print(textwrap.fill(line, 100, initial_indent="  ", subsequent_indent="         "))
    if skipped := [f.name for f in findings if f.severity == "skipped"]:
        print(textwrap.fill(f"skipped until that is mended: {', '.join(skipped)}", 100, subsequent_indent="  "))
    if faults := sum(f.severity == "fault" for f in findings):
        print(f"{faults} fault{'s' * (faults > 1)}")
    else:
        print("no faults found; checked:")
        for check in doctor.CHECKS:
            print(f"  {doctor.title(check):12}{doctor.about(check)}")


def print_costs(stages: Sequence[Estimate], machines: Sequence[Machine]) -> None:
    """Print estimated costs, with a column for each training stage, and the machine speeds that hours are based on."""
    pairs = list(zip(stages, machines, strict=True))
    columns = {stage.recipe.name: _costs(stage, machine) for stage, machine in pairs}
    _print_columns("", columns)
    for text in dict.fromkeys(_rate(stage, machine) for stage, machine in pairs):
        print(f"hours: on {text}")
    memory, needed = machines[0].memory, max(sum(stage.memory) for stage in stages)
    if memory is not None and needed > memory:
        print(f"memory: {needed / GB:.3g} GB are more than the {memory / GB:.3g} there are")
    for stage in stages:
        if stage.outline.classes is None and stage.recipe.objective.outputs is None:
            print(f"{stage.recipe.name}: the images are not there; {stage.architecture.outputs:,} classes are assumed")


def _rate(stage: Estimate, machine: Machine) -> str:
    """Return the speed assumed: ``H100, 25% of 989 TFLOP/s in bfloat16``; ``cpu, 2 threads: 0.12 TFLOP/s in …``."""
    precision = stage.recipe.train.precision
    rate = f"{machine.rates[precision] / TERA:.3g} TFLOP/s in {precision}"
    return f"{machine.name}, {machine.share:.0%} of {rate}" if machine.share < 1 else f"{machine.name}: {rate}, timed"


def _costs(stage: Estimate, machine: Machine) -> dict[str, str]:
    cfg, bounds = stage.recipe.train, (stage.least, stage.most)
    epochs = f" ({stage.images / stage.outline.train:.3g} epochs)" if stage.outline.train else ""
    validated = _validation(stage.validated, stage.validation)
    rows = {
        "parameters": f"{stage.parameters:,}",
        "images": f"{stage.images:,}{epochs}",
        "optimiser steps": f"{stage.images // cfg.batch * stage.recipe.objective.replays:,}",
        "forward passes, an image": _span(passes.forward for passes in bounds),
        "backward passes, an image": _span(passes.backward for passes in bounds),
        "  of searches": _span(passes.search for passes in bounds),
        "teacher's passes, an image": _span(passes.teacher for passes in bounds) if stage.most.teacher else "",
        "validation, forward + backward": validated if stage.validated else "none",
        "samples, forward + backward": _validation(stage.drawn, stage.sampling) if stage.drawn else "",
        "GFLOP, a forward pass": f"{stage.flops.forward / 1e9:.3g}",
        "PFLOP of training": _span(flops / 1e15 for flops in stage.training) if stage.images else "",
        "PFLOP, in all": _span(flops / 1e15 for flops in stage.total),
    }
    names = ("GB: weights", "  optimiser", "  averaged weights", "  activations, gradients")
    rows |= {name: f"{part / GB:.3g}" for name, part in zip(names, stage.memory, strict=True)}
    hours = [machine.hours(flops, cfg.precision) for flops in stage.total]
    if stage.images:
        rows["images a second"] = _span(stage.images / 3600 / duration for duration in reversed(hours))
    rows["hours"] = _span(hours)
    return {name: text for name, text in rows.items() if text}


def _validation(images: int, passes: Passes) -> str:
    return f"{images:,} x {passes.forward:.3g} + {passes.backward:.3g}"


def _span(values: Iterable[float]) -> str:
    """Return a range as text, ``least to most``; one number if both are printed alike."""
    return " to ".join(dict.fromkeys(f"{value:.3g}" for value in values))


def _print_columns(corner: str, columns: Mapping[str, Mapping[str, str]]) -> None:
    """Print a row for each quantity that any column has."""
    quantities = dict.fromkeys(quantity for column in columns.values() for quantity in column)
    rows = [[quantity, *(column.get(quantity, "") for column in columns.values())] for quantity in quantities]
    _print_rows([corner, *columns], rows)


def _print_rows(heads: Sequence[str], rows: Iterable[Sequence[str]], width: int = 120) -> None:
    table = Table(*heads, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    console = Console(highlight=False)
    console.width = max(console.width, width)  # a pipe has no width
    console.print(table)
