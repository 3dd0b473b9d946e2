"""Run the test suite: which launches there are, how they are watched, and what is printed about them."""
