"""The images of a session: which are drawn, where they are kept, and what the judge says of them."""
