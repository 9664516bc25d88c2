"""The same models on many ranks: groups, placement, exchange, engine."""
