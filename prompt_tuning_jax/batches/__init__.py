"""From a SeqIO task to arrays: a cache of token ids, and batches that are a function of seed and step."""
