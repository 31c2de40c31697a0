"""What `onepass bench` measures: the optimizers here, every mode of torch.optim, and the limit of
memory."""
