"""One script a paper: data -> model -> training -> evaluation -> figures, and the paper's claims measured in the small."""
