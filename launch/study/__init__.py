"""Objectives compared: the same model, task and budget, one arm each, several seeds."""
