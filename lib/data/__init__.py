"""From the name of a text to windows of token ids."""
