"""Answers from one frozen base and any number of prompts."""
