"""Every parser of what others wrote, fed with what it was not made for: run.py."""
