"""What `onepass bench` measures: our optimizers, every mode of torch's, and the memory limit.

`suite` says what is measured, `contenders` and `limit` make those that take part, `races` and
`turns` time them, `fresh` starts processes for first steps, `measure` puts all into a report.
"""
