"""Files of adapters that others than PEFT write, as what PEFT would have written."""
