"""Prompts in, in a resumable order; responses out, as token batches."""
