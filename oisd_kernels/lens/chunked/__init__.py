"""A chunk of tokens at a time, its logits in memory."""
