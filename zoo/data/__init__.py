"""Data: time series, TFDS builders, and Grain pipelines over them."""
