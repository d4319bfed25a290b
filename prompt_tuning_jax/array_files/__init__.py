"""Opens files of named arrays without reading the arrays; it does not know what the names mean."""
