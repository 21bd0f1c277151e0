"""Which rows of which Hugging Face tensors make up which Megatron tensor, and who holds them."""
