"""Which operator of a converted model is at fault."""
