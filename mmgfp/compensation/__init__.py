"""Refitting what remains, so that it makes up for removed channels without training."""
