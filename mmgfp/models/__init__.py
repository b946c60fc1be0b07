"""Networks that the libraries lack; a config imports the module it needs."""
