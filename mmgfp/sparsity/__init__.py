"""Single weights set to zero: which ones, when, and how they stay so."""
