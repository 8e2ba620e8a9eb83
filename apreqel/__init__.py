"""apreqel: the best GGUF for one device, measured instead of guessed."""

__version__ = "0.1.0"
