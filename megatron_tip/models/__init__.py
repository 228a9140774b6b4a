"""Student and teacher: stages of Megatron-Core GPT models."""
