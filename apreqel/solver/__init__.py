"""The multiple-choice knapsack, on numbers alone."""
