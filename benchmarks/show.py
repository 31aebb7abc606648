"""Tables and figures of what was measured; ``python -m benchmarks.show FILE.json …`` prints one table of them all."""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter

BUSY, CALM = "#a0a0a0", "#2f6db3"  # peers, ours


def row(measured: dict[str, Any], peak: dict[str, dict[str, float]]) -> str:
    """A side a line: median and best seconds, ratio to the first peer, share of the machine's peak, what it found."""
    return "\n".join(
        f"  {name:28} {cells[0]:>9} s  best {cells[1]:>9}  {cells[2]:>7}  {cells[3]:>5}  {cells[4]}"
        for name, *cells in _cells(measured, peak)
    )


def _cells(measured: dict[str, Any], peak: dict[str, dict[str, float]]) -> list[tuple[str, ...]]:
    sides = {name: side for name, side in measured["sides"].items() if "failed" not in side}
    base = sides.get(measured["peer"])
    lines = []
    for name, side in sides.items():
        ratio = f"{base['median'] / side['median']:.2f} x" if base else ""
        quality = ", ".join(f"{key} {value:.4g}" for key, value in side["quality"].items())
        lines.append((name, f"{side['median']:.4g}", f"{side['best']:.4g}", ratio, share(name, side, peak), quality))
    return lines


def share(name: str, side: dict[str, Any], peak: dict[str, dict[str, float]]) -> str:
    """Of the faster of matrix product and convolution in the same type, in percent; empty where nothing was counted."""
    if not side["flops"]:
        return ""
    most = max(peak["bfloat16" if "bf16" in name else "float32"].values())
    return f"{100 * side['flops'] * side['work'] / side['median'] / most:.0f} %"


def markdown(result: dict[str, Any]) -> str:
    """The tables for results/notes/speed.md."""
    about = result["machine"]
    peak = "; ".join(
        f"{dtype} {', '.join(f'{what} {rate / 1e9:.0f} GFLOP/s' for what, rate in found.items())}"
        for dtype, found in about["peak"].items()
    )
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines = [
        f"{about['date']}, {about['cpu']}, {about['device']}, {about['threads']} threads; {versions}. Medians of "
        f"{result['repeats']} turns. Peak: {peak}.",
        *(
            ["", "With --quick sizes and steps are not those of the names; these numbers mean nothing."]
            * result["quick"]
        ),
        "",
    ]
    for measured in result["rows"]:
        lines += [
            f"**{measured['name']}**",
            "",
            "| who | s | ratio | of peak | found |",
            "| --- | --- | --- | --- | --- |",
        ]
        lines += [
            f"| {name} | {median} | {ratio} | {part} | {quality} |"
            for name, median, _, ratio, part, quality in _cells(measured, about["peak"])
        ]
        lines.append("")
    for axis, sides in result.get("curves", {}).items():
        values = [str(point["value"]) for point in next(iter(sides.values()))]
        lines += [f"**PGD-5, ResNet-8, s (peak MiB) by {axis}**", ""]
        lines += [f"| who | {' | '.join(values)} |", f"| --- |{' --- |' * len(values)}"]
        for who, points in sides.items():
            cells = ["{seconds:.3g} ({peak_mib:.0f})".format(**point) for point in points]
            lines.append(f"| {who} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


WAYS = ("off", "fold", "compile", "bf16", "bf16+compile", "bf16, allocator", "bf16+compile, allocator")


def overview(results: list[dict[str, Any]]) -> str:
    """A row a line: the first peer's seconds, how many times as fast others are, the best one's share of peak."""
    lines = [
        f"| | {' | '.join(WAYS)} | of peak | others |",
        f"| --- |{' --- |' * (len(WAYS) + 2)}",
    ]
    for result in results:
        for measured in result["rows"]:
            sides = {name: side for name, side in measured["sides"].items() if "failed" not in side}
            base = sides[measured["peer"]]["median"]
            times = {name: base / side["median"] for name, side in sides.items()}
            ours = {name: value for name, value in times.items() if name.startswith("advebm ")}
            best = max(ours, key=lambda name: ours[name])
            cells = [f"{ours[f'advebm {way}']:.2f}" if f"advebm {way}" in ours else "" for way in WAYS]
            others = [f"{n} {v:.2f}" for n, v in times.items() if n not in ours and n != measured["peer"]]
            head = f"{measured['name']}: {measured['peer']} {base:.3g} s"
            part = share(best, sides[best], result["machine"]["peak"])
            lines.append(f"| {head} | {' | '.join(cells)} | {part} | {', '.join(others)} |")
    return "\n".join(lines)


def figure(result: dict[str, Any], path: Path) -> None:
    """Ratios to the first peer, a row a panel; and the curves."""
    panels = result["rows"]
    curves = result.get("curves", {})
    height = [max(1, len(r["sides"])) for r in panels]
    fig, axes = plt.subplots(len(panels), 1, figsize=(7, 0.24 * sum(height) + 0.55 * len(panels)), squeeze=False,
                             height_ratios=height)  # fmt: skip
    for ax, measured in zip(axes[:, 0], panels, strict=True):
        cells = [
            (name, float(ratio.split()[0]))
            for name, _, _, ratio, _, _ in _cells(measured, result["machine"]["peak"])
            if ratio
        ]
        names, ratios = [name for name, _ in cells], [ratio for _, ratio in cells]
        ax.barh(names, ratios, color=[CALM if name.startswith("advebm") else BUSY for name in names])
        ax.axvline(1, color="black", lw=0.6)
        ax.invert_yaxis()
        ax.set_title(f"{measured['name']}: times as fast as {measured['peer']}", fontsize=8, loc="left")
        ax.tick_params(labelsize=7)
        ax.spines[["top", "right"]].set_visible(False)
    fig.tight_layout()
    fig.savefig(path, dpi=130)
    plt.close(fig)
    if curves:
        fig, axes = plt.subplots(1, len(curves), figsize=(3.2 * len(curves), 2.8), squeeze=False)
        for ax, (axis, sides) in zip(axes[0], curves.items(), strict=True):
            for who, points in sides.items():
                ax.loglog([p["value"] for p in points], [p["seconds"] for p in points], "o-", ms=3, lw=1, label=who)
            values = [p["value"] for p in next(iter(sides.values()))]
            ax.set_xticks(values, [str(value) for value in values])
            ax.yaxis.set_major_formatter(FuncFormatter(lambda second, _: f"{second:g}"))
            ax.minorticks_off()
            ax.set_title(f"PGD-5 on a ResNet-8, seconds by {axis}", fontsize=8)
            ax.tick_params(labelsize=7)
        axes[0, 0].legend(fontsize=6)
        fig.tight_layout()
        fig.savefig(path.with_name(f"{path.stem}-curves.png"), dpi=130)
        plt.close(fig)


def write(folder: Path, result: dict[str, Any]) -> list[Path]:
    """``DATE.json``, the tables as ``DATE.md`` and the figure ``DATE.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / result["machine"]["date"][:19].replace(":", "")
    paths = [stem.with_suffix(suffix) for suffix in (".json", ".md", ".png")]
    paths[0].write_text(json.dumps(result, indent=1) + "\n")
    paths[1].write_text(markdown(result))
    figure(result, paths[2])
    return paths


if __name__ == "__main__":
    print(overview([json.loads(Path(name).read_text()) for name in sys.argv[1:]]))
