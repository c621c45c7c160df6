"""What blocks and mixers are made of."""
