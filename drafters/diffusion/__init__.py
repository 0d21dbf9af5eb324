"""The diffusion models that draft: checkpoints, windows and caches, vocabularies."""
