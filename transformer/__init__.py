"""One decoder-only transformer: causal in the verifier, bidirectional in the diffusion drafter."""
