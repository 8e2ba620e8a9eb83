"""What a model's files hold: headers, tensors, quant types, recipes, importance matrices."""
