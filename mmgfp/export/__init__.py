"""Export of models to files that other runtimes open."""
