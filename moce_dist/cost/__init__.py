"""The cost of a configuration: sizes, operations, and the time and memory of a step."""
