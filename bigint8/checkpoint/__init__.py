"""Checkpoints on the disk: headers and index, the int8 layout, writing shards, folders that appear when whole."""
