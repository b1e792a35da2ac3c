"""Hugging Face folders to parameters and back."""
