"""The diffusion drafter: its passes, windows and caches, and drafting across vocabularies."""
