"""The version of this package, on the lowest floor: notes in adapters and the server's pages name it."""

__version__ = "0.1.0"
