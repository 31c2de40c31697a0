"""What `onepass train` and `onepass lr-find` do.

`settings` says what to train, `run` holds a model in training, `saved` checks its checkpoints,
`loop` trains it, `display` and `curves` show it, `comparison` times its optimizer, `rate_search`
looks for a learning rate.
"""
