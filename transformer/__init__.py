"""One decoder-only transformer in plain torch, used causally by the verifier and bidirectionally by the diffusion drafter."""
