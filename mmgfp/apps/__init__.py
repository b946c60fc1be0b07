"""What the command-line tools share; uses MMEngine."""
