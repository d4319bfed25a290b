"""Initialises, reads, writes and compares soft prompts."""
