"""Several processes on one job, started by torchrun or accelerate launch."""
