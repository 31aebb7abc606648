"""What a run is on disk: recipe, checkpoints, records.  What fills it is in training, sampling and evaluation."""
