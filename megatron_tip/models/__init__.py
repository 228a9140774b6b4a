"""Student and teacher as Megatron-Core GPT models that return final hidden states, never logits."""
