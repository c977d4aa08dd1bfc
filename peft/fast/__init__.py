"""The same numbers in less time: leave this folder out in reading."""
