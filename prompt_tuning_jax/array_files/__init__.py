"""Opens files of named arrays without reading the arrays, whatever their names mean."""
