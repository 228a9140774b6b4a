"""Hugging Face directories, Megatron-Core models and Megatron checkpoints, each from the others.

Import from the submodules: those that read and describe files need no Megatron.
"""
