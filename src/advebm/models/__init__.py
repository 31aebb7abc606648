"""Networks: normalisation, a backbone, a head; saving, loading and averaging them."""
