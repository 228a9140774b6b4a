"""Conversion between Hugging Face directories, Megatron-Core models and Megatron checkpoints.

Import from the submodules: those that only read and describe files do not need Megatron.
"""
