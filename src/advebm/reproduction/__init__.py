"""Carry out the papers' experiments and tables.  The published numbers are in :mod:`advebm.papers`."""
