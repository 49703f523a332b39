"""What a chain of steps will do to a model, told before any weight is read."""
