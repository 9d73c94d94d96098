"""The packed form of a sparse weight: layout, linear, kernels, checkpoint."""
