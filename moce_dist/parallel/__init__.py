"""The same mathematics on many ranks: groups, placement, exchange, engine."""
