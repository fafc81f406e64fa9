"""Input features: embeddings of ids, numbers, and the block that makes a sequence of them."""
