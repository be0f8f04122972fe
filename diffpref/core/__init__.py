"""The maths and the tensors that travel between stages; imports torch and the standard library only."""
