"""What differs between model families: the names of their modules and their sizes. Plain data, no torch."""
