"""Training: the loop, its batches and validation, and what a recipe costs.  Recipes and checkpoints are in runs."""
