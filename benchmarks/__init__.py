"""Measurements that need no checkpoint: run from the repository's root, the same on a CPU and on CUDA."""
