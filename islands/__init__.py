"""Training jobs of any speed, joined by nothing but a log in a folder or an object store."""
