"""The same numbers in less time: leave this folder out in reading.

Each file says which plain form it stands in for, and is tested against it.
"""
