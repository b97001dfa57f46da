"""What models are made of. Each layer owns its parameters and says which checkpoint tensors fill them."""
