"""From a lattice to a path: candidates, causal models, the path search (CPS), and their kernels."""
