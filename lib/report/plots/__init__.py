"""Pictures, one file each; matplotlib is imported only when something is drawn."""
