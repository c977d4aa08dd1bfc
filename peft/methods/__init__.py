"""One file a method: its equation, its recipe, its wrapper."""
