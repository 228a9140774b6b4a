"""One rank of a large world, run without a GPU or weights: the product's own code on tensors that have only a shape."""
