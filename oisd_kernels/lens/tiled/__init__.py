"""Projection and divergence in one Triton kernel, no logits in memory."""
