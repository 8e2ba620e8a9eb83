"""What a person sees: the printing itself (`terminal`), and how each command's result is shown."""
