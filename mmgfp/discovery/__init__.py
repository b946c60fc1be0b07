"""From a model to its groups of coupled channels."""
