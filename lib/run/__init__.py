"""One run around the work itself: flags, what it is set up with, memory, records."""
