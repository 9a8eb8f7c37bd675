"""Reading and writing files, printing, the exit of a command, records of runs, and several processes."""
