"""Work on many machines: the only chapter that knows Ray."""
