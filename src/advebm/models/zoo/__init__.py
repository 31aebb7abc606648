"""Networks of other libraries, which are imported on first use: timm, transformers and RobustBench."""
