"""Environments that answer the student turn by turn: tools, games, planning tasks."""
