"""What a configuration comes to: sizes, operations, and the time and memory of a step."""
