"""Shared code of the command-line tools, on top of MMEngine."""
