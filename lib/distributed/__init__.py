"""Several processes for one job, started by torchrun or accelerate launch."""
