"""What is trained: one file per method, each an instance of `method.Method`."""
