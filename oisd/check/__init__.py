"""`oisd check`: what to know of a model, its tokenizer and its data before a run."""

from oisd.check.findings import Finding

__all__ = ["Finding"]
