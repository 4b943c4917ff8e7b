"""An OpenAI-compatible server: requests, a queue that batches them, the HTTP side."""
