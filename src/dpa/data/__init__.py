"""From files to batches. Settings are imported from here without torch: keep this file empty of imports."""
