"""What a report says first: how good the run is, in a sentence or two, and what to know before trusting that."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from advebm.attacks.base import ball_text
from advebm.attacks.projected import Attack
from advebm.metrics.keys import key_of
from advebm.metrics.texts import caution, short_text
from advebm.reporting.records import best_set, find_accuracies, rate_sets
from advebm.runs.find_model import trained_threat
from advebm.runs.run import Run

Records = Sequence[Mapping[str, Any]]
VALIDATED = {  # quantity of the log, clean and attacked: what it is
    ("val/accuracy", "val/robust_accuracy"): "{} of the validation images classified correctly",
    ("val/contrastive_accuracy", "val/robust_contrastive_accuracy"): "{} of the validation images told from others",
    ("val/auroc", "val/adversarial_auroc"): "AUROC {} on validation images",
}


def describe(runs: Mapping[str, Run], records: Mapping[str, Records]) -> str:
    """Return how good the first run is, as far as it was measured, and the accuracies of up to three others.

    Args:
        runs: runs by title.
        records: the newest record of each kind, by title of the run.
    """
    title, run = next(iter(runs.items()))
    first = _describe_predictions(records[title], run.recipe.threat) or _describe_validation(run)
    others = [_describe_other(name, records[name], run.recipe.threat) for name in list(runs)[1:]]
    first = f"{title}: {first[0].lower()}{first[1:]}" if others else first
    accuracies = "; ".join([first, *filter(None, others)] if len(others) <= 3 else [first])
    return f"{accuracies}. {_describe_samples(run, title, records)}".strip()


def _describe_predictions(records: Records, threat: Attack) -> str:
    """Return the accuracies of a classifier, or of a probe on an encoder, or the AUROCs of a critic."""
    probes = [key.by for key in map(key_of, records) if key.quantity == "accuracy" and key.by is not None]
    for by in dict.fromkeys([None, *probes]):
        clean, attacked = find_accuracies(records, threat, by)
        if (counted := clean or attacked) is not None:
            who = f"With {by} on its features, classifies" if by else "Classifies"
            first, *rest = _accuracies(clean, attacked)
            return ", ".join([f"{who} {first} of {counted['count']:,} test images correctly", *rest])
    return _describe_detection(records)


def _accuracies(clean: Mapping[str, Any] | None, attacked: Mapping[str, Any] | None) -> list[str]:
    parts = [] if clean is None else [f"{100 * clean['value']:.1f} %"]
    if attacked is not None and (attack := key_of(attacked).attack) is not None:
        parts.append(f"{100 * attacked['value']:.1f} % under attack ({attack.text})")
    return parts


def _describe_other(title: str, records: Records, threat: Attack) -> str:
    accuracies = _accuracies(*find_accuracies(records, threat))
    return f"{title}: {', '.join(accuracies)}" if accuracies else ""


def _describe_detection(records: Records) -> str:
    """Return the lowest and highest AUROC over sets of outliers, clean and attacked."""
    clean: list[Mapping[str, Any]] = []
    attacked: list[Mapping[str, Any]] = []
    for record in records:
        if (key := key_of(record)).quantity == "AUROC" and key.set is not None:
            (clean if key.attack is None else attacked).append(record)
    if not clean:
        return ""
    sets = list(dict.fromkeys(str(key_of(r).set) for r in clean))
    names = sets[0] if len(sets) == 1 else f"{len(sets)} sets of other images"
    under = f", {_range(attacked)} where those are attacked" if attacked else ""
    return f"Tells test images from {names} with an AUROC of {_range(clean)}{under}"


def _range(records: Records) -> str:
    values = [record["value"] for record in records]
    return " to ".join(dict.fromkeys(f"{value:.3f}" for value in (min(values), max(values))))


def _describe_validation(run: Run) -> str:
    """Return the last measurement during training, for a run that was not evaluated."""
    seen: dict[str, Any] = {}
    for line in run.history():
        seen |= line
    text = f"Not evaluated yet (advebm evaluate {run.folder})"
    for (clean, attacked), what in VALIDATED.items():
        if clean in seen:
            show = lambda value, share="AUROC" not in what: f"{100 * value:.1f} %" if share else f"{value:.3f}"
            under = f", {show(seen[attacked])} under attack" if attacked in seen else ""
            return f"{text}; {what.format(show(seen[clean]))} in training{under}"
    return text


def _describe_samples(run: Run, title: str, records: Mapping[str, Records]) -> str:
    """Return how near the best set of samples is to the data, and how much of it shows what was asked for.

    Numbers that say little, those with a caution, are not among them.
    """
    if not (names := list(run.samples())):
        return ""
    own = [[s for s in sets if s.run == title] for sets in rate_sets(records).values()]
    if (best := next(filter(None, map(best_set, own)), None)) is not None:
        distance, intended = best.records["FD"], best.records.get("intended class")
        shown = "" if intended is None else f", {100 * intended['value']:.1f} % classified as intended"
        which = "Best samples" if len(names) > 1 else "Samples"
        return f"{which}, {best.name}: distance to real images FD {short_text(distance)} ({best.space}){shown}."
    texts = [caution(s.records["FD"]) for sets in own for s in sets if "FD" in s.records]
    why = f"FD says little ({texts[0]})" if texts else "not measured yet"
    return f"Samples, {', '.join(names[:3])}{', …' * (len(names) > 3)}: {why}."


def find_warnings(run: Run, history: Records, records: Records) -> list[str]:
    """Return what happened in training, and accuracies under other threats than the model was trained for."""
    lines = []
    for event in (line for line in history if "event" in line):
        rate = f" (learning rate x {event['rate']})" if event.get("rate") else ""
        lines.append(f"{event['event'].capitalize()} at {event['images']:,} images: {event['reason']}{rate}.")
    if not run.finished and not run.stopped_early:
        seen, whole = run.images, run.recipe.train.images
        lines.append(f"Training is not complete: {seen:,} of {whole:,} images (advebm train --resume {run.folder}).")
    return lines + _other_threats(records, trained_threat(run.recipe))


def _other_threats(records: Records, trained: Attack | None) -> list[str]:
    measured: dict[str, set[float]] = {}
    for record in records:
        attack = record["settings"].get("attack")
        if key_of(record).quantity == "accuracy" and isinstance(attack, Mapping) and attack.get("eps"):
            measured.setdefault(attack["norm"], set()).add(attack["eps"])
    if trained is None:
        return []
    known = [(norm, eps) for norm, radii in measured.items() for eps in sorted(radii)]
    other = [
        ball_text(eps, norm)
        for norm, eps in known
        if norm != trained.norm or not any(math.isclose(r, trained.eps, rel_tol=0.01) for r in measured[norm])
    ]
    if not other:
        return []
    names = ", ".join(other[:3]) + ", …" * (len(other) > 3)
    theirs = ball_text(trained.eps, trained.norm)
    return [f"Accuracy under {names}: not the threat that the model was trained for, {theirs}."]
