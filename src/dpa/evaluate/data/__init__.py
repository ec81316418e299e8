"""The seven benchmarks' files, as they are downloaded: where they lie, what a row says, how it is asked. No model."""
