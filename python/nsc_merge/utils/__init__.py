"""What every package uses: checks of options, files that are never half written, plain values, progress."""
