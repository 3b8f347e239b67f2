"""Loading: streaming rows, assigning and converting them, memory for them, saving them again."""
