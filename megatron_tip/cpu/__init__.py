"""Support for machines without a GPU: fast matrix products, a stand-in for CUDA, faster imports."""
