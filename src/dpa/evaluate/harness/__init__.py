"""Outside harnesses, each in a process of its own. Keep this file empty of imports."""
