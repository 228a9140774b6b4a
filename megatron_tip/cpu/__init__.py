"""What exists only for machines without a GPU: matrix products, a stand-in for CUDA, a quicker start."""
