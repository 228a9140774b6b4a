"""Rollouts, and a teacher, on real SGLang servers: started, asked, kept current, replaced."""
