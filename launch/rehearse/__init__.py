"""The whole way of a run on a pod, rehearsed on this machine."""
