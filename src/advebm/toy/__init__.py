"""Energy-based models of two-dimensional data: densities, training, pictures."""
