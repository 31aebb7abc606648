"""Images: where they come from, in which order, how they are augmented."""
