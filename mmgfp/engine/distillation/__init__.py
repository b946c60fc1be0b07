"""Distillation: a model learns from the outputs of a larger one, its teacher."""
