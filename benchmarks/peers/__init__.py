"""`python -m benchmarks peers`: other projects' lenses, graders and training step beside ours."""
