"""Fast training steps of the simplified two-layer model, by torch and by compiled kernels."""
