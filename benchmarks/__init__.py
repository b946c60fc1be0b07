"""Costs of pruning: `python -m benchmarks --help`."""
