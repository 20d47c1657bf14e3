"""What training costs, measured: one file a section of `python -m launch.benchmark`."""
