"""Workflows that commands and experiments share: train, draw, measure and adopt, with progress bars."""
