"""One module a paper; importing it registers its models with `zoo.registry`."""
