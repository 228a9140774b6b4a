"""Teachers in the trainer's own processes or behind servers, with one interface."""
