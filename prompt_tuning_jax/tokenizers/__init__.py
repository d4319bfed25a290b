"""Reads the tokenizers of T5 models: SentencePiece, bytes, and `tokenizer.json`, without TensorFlow."""
