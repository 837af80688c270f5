"""The student's model, whichever trainer it is in: its forward pass, and the head that its loss is formed at."""
