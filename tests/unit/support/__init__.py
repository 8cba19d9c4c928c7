"""What the unit tests are made of."""
