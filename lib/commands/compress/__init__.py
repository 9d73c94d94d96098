"""Makes a model small for one language, by other commands of this package."""
