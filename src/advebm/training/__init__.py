"""Training: recipes, the loop, the engine, checkpoints, run folders."""
