"""Requests in, events out: sequences, the step that advances them, and the engine users hold."""
