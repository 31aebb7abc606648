"""Plumbing without mathematics: configuration, errors, files, random generators, processes.  Methods live elsewhere."""
