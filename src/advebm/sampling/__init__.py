"""Draw sample sets and edits into a run folder, and tune samplers.  The algorithms are in samplers and edits."""
