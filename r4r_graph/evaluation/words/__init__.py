"""What was written: its form, what it gives away, and how near it comes to what it should be."""
