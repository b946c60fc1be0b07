"""Files, nested containers, precision and errors."""
