"""What the operating system does for us: whole files, locks, signals, and processes that end with their parent."""
