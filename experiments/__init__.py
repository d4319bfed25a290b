"""One file a figure, table or base model: what it needs, and how it is drawn."""
