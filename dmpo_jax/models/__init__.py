"""The model: one transformer, its attention, head, adapters, and the ways in which samplers and objectives run it."""
