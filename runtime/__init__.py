"""How a command reads and writes files, prints and ends."""
