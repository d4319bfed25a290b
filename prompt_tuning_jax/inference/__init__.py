"""Answers rows with one frozen base model and any number of prompts."""
