"""What is trained. Settings are imported from here without torch: keep this file empty of imports."""
