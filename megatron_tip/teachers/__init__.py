"""Teachers: one interface, in the trainer's own processes or behind servers."""
