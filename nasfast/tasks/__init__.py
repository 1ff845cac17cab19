"""What a network learns and how it is judged: one module a task."""
