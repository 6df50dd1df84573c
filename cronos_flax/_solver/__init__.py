"""The solver: arrays in, arrays out. Knows no Flax."""
