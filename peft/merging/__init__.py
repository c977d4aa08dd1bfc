"""Updates as weights: written into a weight, added up, averaged."""
