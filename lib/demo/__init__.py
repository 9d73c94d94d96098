"""The whole job in small, on a text and a model that it makes itself."""
