"""What frozen features know: algorithms on tensors, without files and without config."""
