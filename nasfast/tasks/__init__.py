"""What a network learns, how it is judged and how it is used: one module a task."""
