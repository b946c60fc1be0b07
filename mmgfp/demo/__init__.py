"""Data and models of the demo and of the experiments, imported by their configs."""
