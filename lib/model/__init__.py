"""Loading, running, storing and saving a model, its decoder blocks and their matrices."""
