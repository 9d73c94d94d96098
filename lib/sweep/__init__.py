"""Many runs of main.py by one command."""
