"""The plan of a run, checked before it starts: models, layouts, settings, memory."""
