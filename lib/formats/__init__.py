"""Forms of weights: llama.cpp's types, and packed ones."""
