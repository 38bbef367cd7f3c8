"""What the base methods of this package have in common."""
