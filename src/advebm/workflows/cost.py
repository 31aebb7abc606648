"""Print what training a recipe costs."""

from advebm.reporting.terminal import costs_table
from advebm.runs.recipe import Recipe
from advebm.training import cost, hardware
from advebm.workflows.devices import choose_device


def print_costs(recipe: Recipe, machine: str, device: str | None) -> None:
    """Print passes, FLOP, memory and hours of a recipe on the named machine; on this one if the name is empty."""
    if machine:
        found = hardware.find_machine(machine)
        stages = cost.estimates(recipe)
        costs_table(stages, [found] * len(stages))
    else:
        where = choose_device(device)
        stages = cost.estimates(recipe.computed_on(where))
        costs_table(stages, [cost.measure_machine(stage, where) for stage in stages])
