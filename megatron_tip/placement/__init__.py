"""Who runs where: trainer ranks and servers on nodes and GPUs, and the transport of weights that follows."""
