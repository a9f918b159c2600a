"""Many clients' networks as one: each layer does the work of all of them in one set of kernels."""
