"""Training loop, batches, validation, and cost estimates.  Recipes and checkpoints are in runs."""
