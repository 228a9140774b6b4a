"""Student and teacher as Megatron-Core GPT models that hand over final hidden states, never logits."""
