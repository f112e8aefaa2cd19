"""`python -m benchmarks peers`: other projects' logit lenses and graders beside ours."""
