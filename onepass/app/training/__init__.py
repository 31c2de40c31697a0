"""What `onepass train` does: the loop, its checkpoints, and what it shows."""
