"""What a run will be, found and checked before it starts: models, layouts, settings, memory."""
