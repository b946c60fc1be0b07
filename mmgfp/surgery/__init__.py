"""Masks, structures and the compact model."""
