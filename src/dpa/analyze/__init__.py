"""Reports and comparisons. Settings are imported from here without torch: keep this file empty of imports."""
