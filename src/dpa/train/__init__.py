"""A step, and many of them. Settings are imported from here without torch: keep this file empty of imports."""
