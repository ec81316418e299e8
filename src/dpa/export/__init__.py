"""A finished checkpoint in the layouts of others, behind gates: what was written is read back and compared first."""
