"""Small Flax parts that papers share."""
