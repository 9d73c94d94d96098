"""What launch.sh starts: commands around main.py, and those that read what runs leave behind."""
