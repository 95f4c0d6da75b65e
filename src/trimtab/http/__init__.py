"""Serving over HTTP: OpenAI's routes, keys, streams. It knows models by name and tokens by number, and never imports torch."""
