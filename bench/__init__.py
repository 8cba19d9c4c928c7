"""Benchmarks, run by `python -m bench.NAME`. docs/benchmarks.md has the results."""
