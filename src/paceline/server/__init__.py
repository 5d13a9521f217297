"""The engine behind HTTP: an OpenAI-compatible API for a few users, metrics, and a playground."""
