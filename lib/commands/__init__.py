"""What launch.sh starts beside a run of main.py."""
