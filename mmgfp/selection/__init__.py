"""Costs and decisions: pure functions of numbers, without torch."""
