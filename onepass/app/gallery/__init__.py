"""Pictures for those who learn: what the package's own optimizers and schedules do.

`paths`, `moments` and `lr_schedules` compute numbers, the `draw_` files make figures of them,
`album` knows all pictures. `summary` shows a schedule as text.
"""
