"""What is asked, what may be chosen, what was chosen and why."""
