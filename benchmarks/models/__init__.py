"""Taps on every causal language model that transformers registers, each tiny and random.

    python -m benchmarks.models [--types qwen3 gpt_oss] [--out FILE] [--write-docs]

Rows go to `benchmarks/results/models.jsonl`, one per type and version of transformers; types that
are there already are left out, so that a sweep may be stopped and started. `--write-docs` makes
docs/models.md of the rows.
"""
