"""How much the model suffers from each tensor in each quant type."""
