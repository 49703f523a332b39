"""What a model is asked to do, each task one file, registered by name in `llmcompress.tasks`."""
