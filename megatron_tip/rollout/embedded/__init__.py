"""The rollout engine inside the trainer's first process."""
