"""Attacks: searches in a ball around an image for a point the model gets wrong."""
