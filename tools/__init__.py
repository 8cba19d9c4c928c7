"""What is made from the code when it is packaged."""
