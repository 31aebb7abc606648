"""Sets of samples and edits on disk: drawn, tuned, looked at over steps.  Algorithms are in samplers and edits."""
