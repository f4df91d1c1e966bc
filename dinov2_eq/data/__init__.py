"""From a data string to batches of views."""
