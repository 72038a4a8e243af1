"""All tables, and the only code that touches them."""
