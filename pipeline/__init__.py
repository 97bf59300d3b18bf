"""alma: raw text to an aligned chat model, one recipe, every stage resumable."""

__version__ = "0.1.0"
