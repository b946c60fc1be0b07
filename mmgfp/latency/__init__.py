"""Measuring what each layer of a model takes in a runtime, at any widths."""
