"""The main comparison: what is trained and measured, and the pages that show it."""
