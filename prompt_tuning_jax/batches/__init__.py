"""Turns SeqIO tasks, files and rows into cached token ids, and these into batches that depend only on seed and step."""
