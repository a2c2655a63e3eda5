"""What runs, measures and extends the reference; it imports the algorithms, never the reverse."""
