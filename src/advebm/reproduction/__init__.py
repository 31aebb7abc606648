"""The papers' experiments and tables, carried out.  What the papers say is in papers."""
