"""What follows a written file: its name, its card, a folder ready to upload."""
