"""The machine: what it is, how fast it multiplies, what that predicts."""
