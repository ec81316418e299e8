"""What a run will need before it is started: memory, steps, hours, disk, and what is missing."""
