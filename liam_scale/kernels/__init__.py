"""The step's heavy operations: sparse first layers and fused likelihoods, on the CPU and in plain torch."""
