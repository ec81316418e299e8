"""The same answers to lmms-eval's scorers and to ours: answers, lmms-eval's verdicts, explained differences."""
