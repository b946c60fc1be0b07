"""MMEngine's side: hooks, the model factory, checkpoints, export."""
