"""Golden cases of the papers' published code, and the runner that holds our models against them."""
