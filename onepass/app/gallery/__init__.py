"""Pictures for those who learn: what optimizers and schedules do, computed by the package's own."""
