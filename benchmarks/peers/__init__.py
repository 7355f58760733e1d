"""What disco-serve is measured against, each under the same load."""
