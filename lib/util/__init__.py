"""What every folder leans on: errors, progress, commands, files, memory of the host."""
