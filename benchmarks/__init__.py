"""What pruning costs: `python -m benchmarks --help`."""
