"""Judging, recording and running: what turns an attack's proposal into a number others can believe."""
