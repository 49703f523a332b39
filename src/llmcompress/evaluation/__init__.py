"""What a model is worth: tasks, latency, memory, size; each measured the same way for base and candidate."""
