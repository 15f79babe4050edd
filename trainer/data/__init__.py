"""Sources, global order, packing and streams."""
