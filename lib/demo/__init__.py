"""The whole job in small, on texts of the project's own and a model trained on them."""
