"""One script a paper: data -> model -> training -> evaluation -> figures.

Each measures its paper's claims in the small and leaves the numbers in `results/`.
"""
