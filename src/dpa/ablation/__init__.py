"""Methods x seeds x any grid of settings: ``dpa ablate`` (docs/ablate.md)."""
