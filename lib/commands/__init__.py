"""What launch.sh starts."""
