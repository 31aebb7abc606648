"""``python -m tests.recipes [WORD]``: what every recipe of the package, or those with WORD in their name, would take.

As ``advebm train --recipe NAME --dry-run MACHINE`` says, without images; fails if one cannot be
estimated.
"""

import sys

from advebm import recipes
from advebm.core.errors import UserError
from advebm.runs.recipe import resolve
from advebm.training.cost import estimates
from advebm.training.hardware import GB, PUBLISHED

MACHINES = ("rtx4090", "a100", "h200")


def line(name: str) -> str:
    """A row of a Markdown table: network, passes of the last stage, memory, hours of all stages."""
    stages = estimates(resolve(recipes.find(name)))
    span = lambda values: " to ".join(dict.fromkeys(f"{v:.3g}" for v in values))
    hours = [
        span(sum(PUBLISHED[m].hours(s.total[end], s.recipe.train.precision) for s in stages) for end in (0, 1))
        for m in MACHINES
    ]
    last, most = stages[-1], max(sum(s.memory) for s in stages) / GB
    passes = span((last.least.forward, last.most.forward))
    cells = (name, f"{last.parameters / 1e6:.1f}", f"{last.flops.forward / 1e9:.3g}", passes, f"{most:.1f}", *hours)
    return f"| {' | '.join(cells)} |"


def main(words: list[str]) -> int:
    """Print the table; how many recipes failed."""
    print(f"| recipe | M parameters | GFLOP | passes | GB | {' | '.join(PUBLISHED[m].name for m in MACHINES)} |")
    print("| --- " * (5 + len(MACHINES)) + "|")
    failed = 0
    for name in recipes.names():
        if all(word in name for word in words):
            try:
                print(line(name), flush=True)
            except UserError as error:
                failed += 1
                print(f"{name}: {error}", file=sys.stderr)
    return failed


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 1))
