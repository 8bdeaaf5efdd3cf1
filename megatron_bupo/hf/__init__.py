"""Hugging Face checkpoint directories as they lie on disk, read without torch."""
