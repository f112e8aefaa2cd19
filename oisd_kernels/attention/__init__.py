"""Attention and its divergence: `flash.py` and `divergence.py` hold the public functions."""
