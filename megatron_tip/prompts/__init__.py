"""The prompts of a run: reading, rendering, tokenising, and drawing by step."""
