"""The benchmark: one file for each section of `python -m launch.benchmark`, and what they share."""
