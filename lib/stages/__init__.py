"""What changes weights besides pruning: quantization, removal of neurons and experts, training."""
