"""One decoder-only transformer in plain torch: causal in the verifier, bidirectional in the diffusion drafter."""
