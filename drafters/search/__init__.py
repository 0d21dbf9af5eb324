"""From a lattice to a path: candidates, the causal model, the path search (CPS), free drafts, and their kernels."""
