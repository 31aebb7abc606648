"""The published results, and their agreement with ours.  The code that reproduces them is in reproduction."""
