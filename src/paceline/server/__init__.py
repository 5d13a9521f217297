"""An HTTP server for the engine: an OpenAI-compatible API for a few users, metrics, and a playground."""
