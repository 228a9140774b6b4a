"""Process launch, process groups, and Megatron-Core on machines without a GPU."""
