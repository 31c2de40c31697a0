"""What torch.optim promises of param groups, options and state dicts, and what is said when
somebody breaks it.

Nothing here knows how a step is made.
"""
