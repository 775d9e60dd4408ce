"""What a run looks like: its pictures, and one page that holds them."""
