"""Runs one program on many devices and processes: the mesh, the shardings, and the start and end of processes."""
