"""Reports: a self-contained HTML file for each run, its figures, tables and model card."""
