"""Run folders: recipe, checkpoints, records.  The code that fills them is in training, sampling and evaluation."""
