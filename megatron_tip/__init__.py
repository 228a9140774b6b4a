"""Token-selective on-policy distillation on Megatron-Core."""
