"""Bodies of session models: from the vectors of items to those at which a prediction is made."""
