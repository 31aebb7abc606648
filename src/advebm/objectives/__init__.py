"""Objectives: what a training step searches for and what it then minimises."""
