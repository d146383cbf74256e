"""What servers make of an adapter: their rules for keys and ranks, one module each, and the form that they all take."""
