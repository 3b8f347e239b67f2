"""Which stage lives on which device, with the bytes of each. Pure functions over plain data, no torch."""
