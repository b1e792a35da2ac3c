"""The embedded family, demonstrations built on the user's machine, and the demo that uses both."""
