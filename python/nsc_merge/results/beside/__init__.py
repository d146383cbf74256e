"""What lies beside the weights of a saved merge: record, card, notes for servers, pictures."""
