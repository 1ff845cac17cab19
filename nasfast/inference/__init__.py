"""Trained networks in use: loaded, predicting, exported."""
