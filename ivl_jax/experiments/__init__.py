"""The embedded family, the demonstrations made on the spot, and the demo that uses both."""
