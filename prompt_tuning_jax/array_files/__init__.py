"""Files of named arrays, opened without reading them; what the names mean is for the floors above."""
