"""Hugging Face directories and Megatron-Core models, both ways, as streams of single tensors."""
