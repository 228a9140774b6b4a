"""The prompts of a run: read, rendered, tokenised, drawn by step."""
