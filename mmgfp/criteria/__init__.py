"""Importance criteria: how much the loss depends on each unit."""
