"""What param groups, options and state dicts may be in torch.optim, and what is said of others.

It knows the forms in which options are given, the names of states, and torch's words. It must not
know how a step is made: of `kernel` it asks only where tensors lie and which columns a rule names.
"""
