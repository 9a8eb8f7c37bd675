"""Reading and writing files, printing, and the exit of a command."""
