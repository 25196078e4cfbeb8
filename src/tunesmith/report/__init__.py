"""What people look at: the plan, the live view, the results."""
