"""Benchmarks: `python -m bench.records`. docs/benchmarks.md has what they gave."""
