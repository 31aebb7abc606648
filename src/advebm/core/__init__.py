"""Infrastructure without mathematics: configuration, errors, files, random generators and processes."""
