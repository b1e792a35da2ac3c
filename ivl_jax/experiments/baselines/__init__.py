"""Relatives of value networks in one table: parameter arithmetic, soups, strength policies."""
