"""Rehearses a run on a pod, from the checkpoint to the export, on this machine."""
