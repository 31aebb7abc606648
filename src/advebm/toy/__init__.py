"""Energies in the plane: densities, training on them, their pictures."""
