"""TFDS builders for data that the TFDS catalogue lacks. Importing one imports tensorflow_datasets (a second or two)."""
