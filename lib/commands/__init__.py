"""What `launch.sh` starts besides `main.py`: whole commands, each a file or a folder."""
