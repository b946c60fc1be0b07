"""Comparisons of many ways to prune one model: settings, runs, results."""
