"""The laboratory: comparisons, tables, pictures, costs. Never needed to understand a method."""
