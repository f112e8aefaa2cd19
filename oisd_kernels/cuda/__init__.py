"""The host's side of csrc/: nvcc, the driver, argument structures."""
