"""One page about one model on one device, from what its work folder holds."""
