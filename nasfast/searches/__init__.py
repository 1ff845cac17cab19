"""The two ways to search: sampled candidates, and a supernet by gradient."""
