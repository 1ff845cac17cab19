"""Tasks: data, loss, metric and reward, one file each."""
