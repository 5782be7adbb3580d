"""Speed and scale; each module runs alone and prints one table."""
